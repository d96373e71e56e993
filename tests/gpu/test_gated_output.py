"""The gated output's kernels: values and gradients against float64, bits, masks, vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance

from genie_tk_jax import explain, gated_output, init_triangle_multiplication
from genie_tk_jax.ops.gated_output import GROUPS

pytestmark = pytest.mark.gpu

SIZES = [(1, 1), (77, 129), (200, 40), (5, 257)]


def drawn(rows, columns, c_z=128, c_hidden=128, dtype=jnp.bfloat16, batch=2, use_bias=True):
    rng = np.random.default_rng(rows + columns + c_z)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    weights = init_triangle_multiplication(
        jax.random.key(3), c_z, c_hidden, use_bias=use_bias, init="random"
    )
    t = 3 * normal(batch, c_hidden, rows, columns)
    mask = jnp.asarray(rng.random((batch, rows, columns)) < 0.9)
    z, d_out = (normal(batch, rows, columns, c_z).astype(dtype) for _ in range(2))
    t = t if dtype == jnp.float16 else t.astype(dtype)
    return t, z, {group: weights[group] for group in GROUPS}, mask, d_out


def run(implementation, t, z, weights, mask, d_out, residual):
    """The result and the gradients of t, z and weights, as a flat dict."""
    call = partial(gated_output, residual=residual, mask=mask, implementation=implementation)
    out, pull = jax.vjp(lambda *args: call(*args), t, z, weights)
    leaves, _ = jax.tree_util.tree_flatten_with_path((out, *pull(d_out)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def truth(t, z, weights, mask, d_out, residual):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (t, z, weights, d_out)
        )
        return run("xla", *wide[:3], mask, wide[3], residual)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_is_as_exact_as_xla(sizes, dtype, residual):
    *given, mask, d_out = drawn(*sizes, dtype=dtype, use_bias=residual)
    arguments = (*given, mask, d_out, residual)
    exact = truth(*arguments)
    ours, again, theirs = (run(i, *arguments) for i in ("cuda", "cuda", "xla"))
    for name, want in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        assert distance(ours[name], want) <= 1.05 * distance(theirs[name], want) + 1e-6, name
        assert np.array_equal(ours[name], again[name]), name


@pytest.mark.parametrize("c_z, c_hidden", [(64, 64), (64, 128), (128, 64), (64, 256), (256, 256)])
def test_widths(c_z, c_hidden):
    *given, mask, d_out = drawn(33, 70, c_z, c_hidden)
    arguments = (*given, mask, d_out, True)
    exact = truth(*arguments)
    ours, theirs = (run(i, *arguments) for i in (None, "xla"))
    for name, want in exact.items():
        assert distance(ours[name], want) <= 1.05 * distance(theirs[name], want) + 1e-6, name


def test_garbage_under_the_mask_harms_nothing():
    t, z, weights, mask, d_out = drawn(77, 129)
    garbage = jnp.where(mask[..., None], z, jnp.nan)
    clean = jnp.where(mask[..., None], z, 0)
    ours, theirs = (run("cuda", t, x, weights, mask, d_out, True) for x in (garbage, clean))
    for name, value in ours.items():
        if value.shape == z.shape and name != "[0]":  # dz is zero where z was not read
            assert not np.any(np.asarray(value)[~np.asarray(mask)])
        else:
            assert np.array_equal(value, theirs[name]), name


def test_explain_and_vmap():
    t, z, weights, mask, d_out = drawn(40, 72)
    gradient = jax.grad(lambda t, z: gated_output(t, z, weights).astype(jnp.float32).sum(), (0, 1))
    assert [str(choice.implementation) for choice in explain(gradient, t, z)] == ["cuda", "cuda"]
    mapped = jax.vmap(lambda t, z, m: gated_output(t, z, weights, mask=m))(t, z, mask)
    assert np.array_equal(mapped, gated_output(t, z, weights, mask=mask))
