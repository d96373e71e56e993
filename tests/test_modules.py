"""nnx = linen = function, on one canonical tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import LAYER_IDS, LAYERS, mask, pair
from flax import nnx

import genie_tk_jax
import genie_tk_jax.linen

C = 16
NAMES = {
    "outgoing": "TriangleMultiplicationOutgoing",
    "incoming": "TriangleMultiplicationIncoming",
    "starting": "TriangleAttentionStartingNode",
    "ending": "TriangleAttentionEndingNode",
}
layers = pytest.mark.parametrize("op, how", LAYERS, ids=LAYER_IDS)


def widths(op):
    return (C, 12) if op == "triangle_multiplication" else (C, 4, 3)


def settings(how):
    (kind, *rest) = how.values()
    return NAMES[kind], {"ending_bias": rest[0]} if rest else {}


def tree_of(module):
    """The module's parameters as the nested dict of arrays that the functions take."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree.map(jnp.asarray, state)


@layers
@pytest.mark.parametrize("use_bias, residual", [(True, True), (False, False)])
def test_nnx_linen_and_function_agree(op, how, use_bias, residual):
    name, extra = settings(how)
    how_made = dict(use_bias=use_bias, residual=residual, **extra)
    module = getattr(genie_tk_jax, name)(
        *widths(op), **how_made, init_scheme="random", rngs=nnx.Rngs(0)
    )
    z, valid = pair(1, 6, C), mask(2, 6)
    weights = tree_of(module)
    expected = getattr(genie_tk_jax, op)(z, valid, weights, **how, residual=residual)
    # Same operations in the same order: not a bit may differ.
    np.testing.assert_array_equal(module(z, valid), expected)
    linen = getattr(genie_tk_jax.linen, name)(*widths(op), **how_made)
    np.testing.assert_array_equal(linen.apply({"params": weights}, z, valid), expected)


@layers
def test_both_frameworks_make_the_canonical_tree(op, how):
    name, extra = settings(how)
    expected = getattr(genie_tk_jax, f"init_{op}")(jax.random.key(0), *widths(op))
    shapes = jax.tree.map(jnp.shape, expected)
    module = getattr(genie_tk_jax, name)(*widths(op), **extra, rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, tree_of(module)) == shapes
    linen = getattr(genie_tk_jax.linen, name)(*widths(op), **extra)
    variables = linen.init(jax.random.key(0), pair(1, 3, C))
    assert jax.tree.map(jnp.shape, variables["params"]) == shapes


def test_nnx_trains_under_jit():
    module = genie_tk_jax.TriangleAttentionEndingNode(
        C, 4, 3, rngs=nnx.Rngs(0), init_scheme="random"
    )
    z, valid = pair(1, 5, C), mask(2, 5)

    @nnx.jit
    def step(module, z):
        return nnx.value_and_grad(lambda module: jnp.sum(jnp.sin(module(z, valid))))(module)

    loss, gradients = step(module, z)
    assert np.isfinite(loss)
    for leaf in jax.tree.leaves(gradients):
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_dtype_and_param_dtype(framework):
    z = pair(1, 5, C)
    how = dict(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    if framework == "nnx":
        module = genie_tk_jax.TriangleMultiplicationOutgoing(C, 12, **how, rngs=nnx.Rngs(0))
        out, leaves = module(z), jax.tree.leaves(tree_of(module))
    else:
        module = genie_tk_jax.linen.TriangleMultiplicationOutgoing(C, 12, **how)
        out, variables = module.init_with_output(jax.random.key(0), z)
        leaves = jax.tree.leaves(variables)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float16")}


def test_alphafold_initialisation():
    """Zero updates at first, gates at sigmoid(1), haiku's fans for q: AlphaFold 2's start."""
    key = jax.random.key(0)
    weights = genie_tk_jax.init_triangle_attention(key, 128, 32, 4)
    limit = np.sqrt(3 / ((4 * 128 + 32 * 128) / 2))
    for name in "qkv":
        kernel = np.abs(weights[name]["kernel"])
        assert 0.98 * limit < kernel.max() <= limit
    assert np.std(weights["pair_bias"]["kernel"]) == pytest.approx(128**-0.5, rel=0.1)
    assert not np.any(weights["out"]["kernel"]) and not np.any(weights["gate"]["kernel"])
    assert np.all(weights["gate"]["bias"] == 1)
    weights = genie_tk_jax.init_triangle_multiplication(key, 128, 64)
    assert np.std(weights["proj_in"]["kernel"]) == pytest.approx(128**-0.5, rel=0.05)
    assert np.abs(weights["proj_in"]["kernel"]).max() < 2.3 * 128**-0.5, "truncated at two sigma"
    assert not np.any(weights["proj_out"]["kernel"])
    assert np.all(weights["gate_in"]["bias"] == 1)


@pytest.mark.parametrize("use_bias", [True, False])
def test_random_initialisation_leaves_nothing_zero_or_constant(use_bias):
    how = dict(use_bias=use_bias, init="random")
    for weights in (
        genie_tk_jax.init_triangle_multiplication(jax.random.key(0), 16, 8, **how),
        genie_tk_jax.init_triangle_attention(jax.random.key(0), 16, 4, 2, **how),
    ):
        for leaf in jax.tree.leaves(weights):
            assert np.all(np.asarray(leaf) != 0) and np.std(leaf) > 0
