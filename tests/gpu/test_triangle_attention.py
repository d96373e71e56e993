"""Triangle attention and its core on the GPU: exactness, repeatability, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import ATTENTION, core, distance, mask, pair
from judge import (
    SEEDS,
    assert_as_exact_as_xla,
    assert_padding_changes_nothing,
    assert_same_bits,
    layer,
    problem,
    step,
)

import genie_tk_jax

pytestmark = pytest.mark.gpu

NODES = {"-".join([node, *how.values()]): {"node": node, **how} for node, how in ATTENTION}
# dtype, N, batch, c_in, no_heads, c_hidden, use_bias, residual
FORMS = {
    "bfloat16": (jnp.bfloat16, 129, (), 128, 4, 32, True, True),
    "float16": (jnp.float16, 77, (2,), 64, 4, 16, False, False),
    "wide heads": (jnp.bfloat16, 77, (), 64, 2, 64, True, False),
}
OPS = {
    (node, form): layer("triangle_attention", **how, residual=FORMS[form][-1])
    for node, how in NODES.items()
    for form in FORMS
    if node == "starting" or form != "wide heads"
}
layers = pytest.mark.parametrize("node", NODES)
all_forms = pytest.mark.parametrize("node, form", OPS)


def params(seed, c_in, no_heads, c_hidden, use_bias=True):
    key = jax.random.key(seed)
    return genie_tk_jax.init_triangle_attention(
        key, c_in, c_hidden, no_heads, use_bias=use_bias, init="random"
    )


def drawn(node, form, seed):
    dtype, n, batch, *widths, use_bias, _ = FORMS[form]
    inputs = {
        "z": pair(seed, n, widths[0], batch, dtype),
        "params": params(seed, *widths, use_bias),
    }
    return problem(OPS[node, form], seed, inputs, mask(seed, n, batch))


@all_forms
def test_as_exact_as_xla(node, form):
    op = OPS[node, form]
    assert_as_exact_as_xla(op, [drawn(node, form, seed) for seed in SEEDS])


@all_forms
def test_same_inputs_same_bits(node, form):
    run, given = step(OPS[node, form]), drawn(node, form, 0)
    assert_same_bits(run(*given), run(*given))


@layers
def test_a_single_pair(node):
    dtype, _, _, *widths, use_bias, residual = FORMS["bfloat16"]
    inputs = {"z": pair(1, 1, widths[0], (), dtype), "params": params(2, *widths, use_bias)}
    op = OPS[node, "bfloat16"]
    out, gradients = step(op)(*problem(op, 3, inputs, None))
    expected = oracle.triangle_attention(
        inputs["z"], None, inputs["params"], **NODES[node], residual=residual
    )
    assert distance(out, expected) < 4 * float(jnp.finfo(dtype).eps)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@layers
def test_padding_changes_nothing(node):
    inputs = {"z": pair(1, 77, 128, (), jnp.bfloat16), "params": params(2, 128, 4, 32)}
    op, valid = OPS[node, "bfloat16"], mask(3, 77)
    assert_padding_changes_nothing(
        op, problem(op, 4, inputs, valid), lambda out: out[:77, :77][valid]
    )


def attend(inputs, mask, implementation=None):
    operands = (inputs.get(name) for name in ("q", "k", "v", "bias"))
    return genie_tk_jax.pair_attention(*operands, mask, implementation=implementation)


def core_problem(seed, dtype, rows, queries, keys, width):
    *operands, valid = core(seed, rows, queries, keys, heads=2, width=width, dtype=dtype)
    inputs = dict(zip(("q", "k", "v", "bias"), operands, strict=True))
    return problem(attend, seed, inputs, valid)


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (jnp.bfloat16, (9, 129, 77, 32)),
        (jnp.bfloat16, (9, 77, 129, 16)),
        (jnp.float16, (9, 129, 77, 32)),
        (jnp.float16, (5, 77, 129, 64)),
    ],
)
def test_core_is_as_exact_as_xla(dtype, sizes):
    assert_as_exact_as_xla(attend, [core_problem(seed, dtype, *sizes) for seed in SEEDS])


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**6])
def test_core_in_float16_at_any_scale_of_the_gradient(scale):
    def scaled(inputs, mask, implementation=None):
        return attend(inputs, mask, implementation) * jnp.float16(scale)

    given = [core_problem(seed, jnp.float16, 9, 77, 129, 32) for seed in SEEDS]
    assert_as_exact_as_xla(scaled, given)


def test_core_without_bias_or_mask():
    given = [core_problem(seed, jnp.bfloat16, 3, 77, 77, 32) for seed in SEEDS]
    bare = [{name: x for name, x in one.inputs.items() if name != "bias"} for one in given]
    problems = [problem(attend, seed, x, None) for seed, x in zip(SEEDS, bare, strict=True)]
    assert_as_exact_as_xla(attend, problems)


def test_padding_changes_nothing_in_the_core():
    given = core_problem(1, jnp.bfloat16, 77, 77, 77, 32)
    assert_padding_changes_nothing(attend, given, lambda o: o[:77, :77])
