"""Triangle multiplication and its stages on the GPU: exactness, repeatability, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import distance, mask, pair
from judge import (
    SEEDS,
    assert_as_exact_as_xla,
    assert_padding_changes_nothing,
    assert_same_bits,
    layer,
    normal,
    problem,
    step,
)

import genie_tk_jax

pytestmark = pytest.mark.gpu

DIRECTIONS = ("outgoing", "incoming")
# dtype, N, batch, c_z, c_hidden, use_bias, residual
FORMS = {
    "bfloat16": (jnp.bfloat16, 129, (), 128, 64, True, True),
    "float16": (jnp.float16, 77, (2,), 64, 128, False, False),
}
OPS = {
    (direction, form): layer(
        "triangle_multiplication", direction=direction, residual=FORMS[form][-1]
    )
    for direction in DIRECTIONS
    for form in FORMS
}
layers = pytest.mark.parametrize("direction", DIRECTIONS)
forms = pytest.mark.parametrize("form", FORMS)


def params(seed, c_z, c_hidden, use_bias=True):
    key = jax.random.key(seed)
    return genie_tk_jax.init_triangle_multiplication(
        key, c_z, c_hidden, use_bias=use_bias, init="random"
    )


def drawn(direction, form, seed):
    dtype, n, batch, c_z, c_hidden, use_bias, _ = FORMS[form]
    inputs = {
        "z": pair(seed, n, c_z, batch, dtype),
        "params": params(seed, c_z, c_hidden, use_bias),
    }
    return problem(OPS[direction, form], seed, inputs, mask(seed, n, batch))


@layers
@forms
def test_as_exact_as_xla(direction, form):
    op = OPS[direction, form]
    assert_as_exact_as_xla(op, [drawn(direction, form, seed) for seed in SEEDS])


@layers
@forms
def test_same_inputs_same_bits(direction, form):
    run, given = step(OPS[direction, form]), drawn(direction, form, 0)
    assert_same_bits(run(*given), run(*given))


@layers
def test_a_single_pair(direction):
    dtype, _, _, *widths, use_bias, residual = FORMS["bfloat16"]
    inputs = {"z": pair(1, 1, widths[0], (), dtype), "params": params(2, *widths, use_bias)}
    op = OPS[direction, "bfloat16"]
    out, gradients = step(op)(*problem(op, 3, inputs, None))
    expected = oracle.triangle_multiplication(
        inputs["z"], None, inputs["params"], direction, residual
    )
    assert distance(out, expected) < 4 * float(jnp.finfo(dtype).eps)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@layers
def test_padding_changes_nothing(direction):
    inputs = {"z": pair(1, 77, 128, (), jnp.bfloat16), "params": params(2, 128, 64)}
    op, valid = OPS[direction, "bfloat16"], mask(3, 77)
    assert_padding_changes_nothing(
        op, problem(op, 4, inputs, valid), lambda out: out[:77, :77][valid]
    )


# The stages, on pairs that are not square.

ROWS, COLUMNS, C_Z, C_HIDDEN = 77, 129, 64, 128


def projection(inputs, mask, implementation=None):
    how = dict(implementation=implementation)
    return genie_tk_jax.gated_projection(inputs["z"], mask, inputs["params"], **how)


def contraction(direction):
    def call(inputs, mask, implementation=None):
        how = dict(implementation=implementation)
        return genie_tk_jax.contract(inputs["a"], inputs["b"], direction, **how)

    return call


def output(inputs, mask, implementation=None):
    how = dict(mask=mask, implementation=implementation)
    return genie_tk_jax.gated_output(inputs["t"], inputs["z"], inputs["params"], **how)


STAGES = {
    "gated_projection": projection,
    "outgoing": contraction("outgoing"),
    "incoming": contraction("incoming"),
    "gated_output": output,
}
stages = pytest.mark.parametrize("name", STAGES)


def stage_problem(name, seed, dtype=jnp.bfloat16, rows=ROWS, columns=COLUMNS):
    whole = {"z": pair(seed, max(rows, columns), C_Z, (), dtype)[:rows, :columns]}
    whole["params"] = params(seed, C_Z, C_HIDDEN)
    if name == "gated_output":
        whole["t"] = normal(seed, (C_HIDDEN, rows, columns), dtype)
    if name in DIRECTIONS:
        long, short = (columns, 40), (rows, 40)
        shapes = (short, long) if name == "outgoing" else (short[::-1], long[::-1])
        whole = {
            key: normal(seed + index, (C_HIDDEN, *shape), dtype)
            for index, (key, shape) in enumerate(zip("ab", shapes, strict=True))
        }
    valid = None if name in DIRECTIONS else mask(seed, max(rows, columns))[:rows, :columns]
    return problem(STAGES[name], seed, whole, valid)


@stages
def test_stages_are_as_exact_as_xla(name):
    assert_as_exact_as_xla(STAGES[name], [stage_problem(name, seed) for seed in SEEDS])


def test_padding_changes_nothing_in_the_projection():
    given = stage_problem("gated_projection", 1, rows=77, columns=77)
    assert_padding_changes_nothing(projection, given, lambda x: x[..., :77, :77])


def test_padding_changes_nothing_in_the_output():
    given = stage_problem("gated_output", 1, rows=77, columns=77)
    assert_padding_changes_nothing(output, given, lambda out: out[:77, :77])
