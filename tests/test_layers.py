"""The layers against the float64 oracle: values, gradients, masks, dtypes."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import LAYER_IDS, LAYERS, distance, implementations, mask, pair, params

import genie_tk_jax

layers = pytest.mark.parametrize("op, how", LAYERS, ids=LAYER_IDS)


def truth_of(op, how, z, valid, weights, **settings):
    """The oracle over a batch: it knows no batch itself."""
    one = getattr(oracle, op)
    (kind, *rest), settings = how.values(), {**settings}
    settings.update({"ending_bias": rest[0]} if rest else {})
    z = np.asarray(z, np.float64)
    flat = z.reshape(-1, *z.shape[-3:])
    masks = [None] * len(flat) if valid is None else np.asarray(valid).reshape(-1, *z.shape[-3:-1])
    results = [one(x, m, weights, kind, **settings) for x, m in zip(flat, masks, strict=True)]
    return np.stack(results).reshape(z.shape)


@layers
@implementations
@pytest.mark.parametrize("n, batch", [(1, ()), (2, (3,)), (7, ()), (13, (2, 2))])
@pytest.mark.parametrize("use_bias, residual", [(True, False), (False, True)])
def test_equals_the_oracle(op, how, implementation, n, batch, use_bias, residual, float64):
    z, valid = pair(1, n, 16, batch, float64), mask(2, n, batch)
    weights = params(op, 3, 16, float64, use_bias)
    layer = getattr(genie_tk_jax, op)
    out = layer(z, valid, weights, **how, residual=residual, implementation=implementation)
    assert out.shape == z.shape and out.dtype == z.dtype
    assert distance(out, truth_of(op, how, z, valid, weights, residual=residual)) < 1e-12


@pytest.mark.parametrize("how", [how for op, how in LAYERS if op == "triangle_attention"])
@pytest.mark.parametrize("use_bias, residual", [(True, False), (False, True)])
def test_the_backward_by_stages_equals_that_of_jax(how, use_bias, residual, float64, monkeypatch):
    """What runs where there are kernels, on its references, with garbage under the mask."""
    module = importlib.import_module("genie_tk_jax.ops.triangle_attention")
    monkeypatch.setattr(module, "_backward_by_rows", module._backward_by_stages)
    n, batch = 7, (2,)
    valid, weights = mask(2, n, batch), params("triangle_attention", 3, 16, float64, use_bias)
    z = jnp.where(valid[..., None], pair(1, n, 16, batch, float64), jnp.nan)
    cotangent = np.random.default_rng(4).normal(size=z.shape)

    def scalar(z, weights, implementation):
        out = genie_tk_jax.triangle_attention(
            z, valid, weights, **how, residual=residual, implementation=implementation
        )
        return jnp.sum(out * cotangent)

    found, expected = (jax.grad(scalar, (0, 1))(z, weights, i) for i in (None, "xla"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-11), found, expected)


@layers
@implementations
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_equal_central_differences(op, how, implementation, residual, float64):
    n, c_z = 7, 16
    z, valid = pair(1, n, c_z, (), float64), mask(2, n)
    weights = params(op, 3, c_z, float64)
    cotangent = np.random.default_rng(4).normal(size=z.shape)
    layer = getattr(genie_tk_jax, op)

    def scalar(z, weights):
        out = layer(z, valid, weights, **how, residual=residual, implementation=implementation)
        return jnp.sum(out * cotangent)

    gradients = jax.jit(jax.grad(scalar, argnums=(0, 1)))(z, weights)
    leaves, tree = jax.tree.flatten((z, weights))
    directions, along = [], []
    for index, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        direction = np.random.default_rng(index).normal(size=leaf.shape)
        zeros = [np.zeros(x.shape) for x in leaves]
        directions.append(tree.unflatten([*zeros[:index], direction, *zeros[index + 1 :]]))
        along.append(np.vdot(gradient, direction))
    expected = oracle.central_difference(
        lambda inputs: truth_of(op, how, inputs[0], valid, inputs[1], residual=residual),
        (z, weights),
        cotangent,
        directions,
    )
    np.testing.assert_allclose(along, expected, rtol=1e-6, atol=1e-6)


@layers
@implementations
@pytest.mark.parametrize("dtype, units", [("float32", 32), ("bfloat16", 4), ("float16", 4)])
def test_every_dtype_is_as_exact_as_it_can_be(op, how, implementation, dtype, units):
    """Errors in units of the dtype's own spacing: a handful of roundings lie on every path."""
    limit = units * float(jnp.finfo(dtype).eps)
    z, valid, weights = pair(1, 19, 32, (), dtype), mask(2, 19), params(op, 3, 32)
    layer = getattr(genie_tk_jax, op)
    cotangent = np.random.default_rng(4).normal(size=z.shape)

    def out_and_gradients(layer, z, weights):
        out, pull = jax.vjp(lambda z, w: layer(z, valid, w, **how), z, weights)
        return out, *pull(jnp.asarray(cotangent, out.dtype))

    def ours(*arguments, **how):
        return layer(*arguments, **how, implementation=implementation)

    result = jax.jit(partial(out_and_gradients, ours))(z, weights)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (z, weights))
        truth = jax.jit(partial(out_and_gradients, layer))(*wide)
    assert result[0].dtype == result[1].dtype == z.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(result[2])} == {jnp.dtype("float32")}
    for ours, exact in zip(jax.tree.leaves(result), jax.tree.leaves(truth), strict=True):
        assert distance(ours, exact) < limit


@layers
@implementations
def test_garbage_under_the_mask_harms_nothing(op, how, implementation):
    n = 9
    z, valid, weights = pair(1, n, 16), mask(2, n), params(op, 3, 16)
    hidden = np.argwhere(~valid)
    clean, dirty = (np.asarray(z).copy() for _ in range(2))
    for (i, j), garbage in zip(hidden, [np.nan, np.inf, -np.inf, 3e38] * n, strict=False):
        dirty[i, j, 1:] = garbage
        clean[i, j] = 0
    layer = getattr(genie_tk_jax, op)

    def run(z):
        def total(z, weights):
            out = layer(z, valid, weights, **how, residual=True, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(z, weights)
        return out, gradients

    (out, (dz, d_weights)), (expected, (dz_clean, d_clean)) = run(jnp.asarray(dirty)), run(clean)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, d_weights, d_clean)
    changed = (dirty != clean).any(axis=-1)
    assert not np.asarray(dz)[changed].any()
    np.testing.assert_array_equal(np.asarray(dz)[~changed], np.asarray(dz_clean)[~changed])


@layers
def test_masks_of_any_dtype_mean_the_same(op, how):
    z, valid, weights = pair(1, 6, 16), mask(2, 6), params(op, 3, 16)
    layer = getattr(genie_tk_jax, op)
    expected = layer(z, valid, weights, **how)
    for other in (valid.astype(np.int32), jnp.asarray(valid, jnp.bfloat16), valid * 1.0):
        np.testing.assert_array_equal(layer(z, other, weights, **how), expected)
    np.testing.assert_array_equal(
        layer(z, None, weights, **how), layer(z, np.ones_like(valid), weights, **how)
    )


@layers
@implementations
def test_an_empty_batch_gives_an_empty_result(op, how, implementation):
    z, weights = jnp.zeros((0, 5, 5, 16)), params(op, 3, 16)
    layer = getattr(genie_tk_jax, op)

    def scalar(weights, z):
        return jnp.sum(layer(z, None, weights, **how, implementation=implementation))

    assert layer(z, None, weights, **how, implementation=implementation).shape == z.shape
    d_weights, dz = jax.grad(scalar, (0, 1))(weights, z)
    assert dz.shape == z.shape
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(d_weights))


def test_variance_is_two_pass():
    """E[x^2] - E[x]^2 in float32 has lost every digit at a mean of 3,000 times the deviation."""
    z = pair(1, 5, 64, dtype=jnp.float32) + 3000.0
    weights = params("triangle_multiplication", 3, 64)
    out = genie_tk_jax.triangle_multiplication(z, None, weights, direction="outgoing")
    truth = oracle.triangle_multiplication(np.asarray(z, np.float64), None, weights, "outgoing")
    assert distance(out, truth) < 2e-3


def test_float16_contraction_does_not_overflow():
    n = 48
    weights = params("triangle_multiplication", 3, 16)
    weights["proj_in"]["kernel"] = weights["proj_in"]["kernel"] * 100
    z = pair(1, n, 16, dtype=jnp.float16)
    out = genie_tk_jax.triangle_multiplication(z, None, weights, direction="outgoing")
    truth = oracle.triangle_multiplication(np.asarray(z), None, weights, "outgoing")
    assert distance(out, truth) < 1e-2
    a, b = genie_tk_jax.gated_projection(z, None, weights)
    t = genie_tk_jax.contract(a, b, "outgoing")
    assert np.abs(t).max() > 65504, "the input must reach what float16 cannot hold"


@implementations
def test_public_stages_make_up_the_layer(implementation):
    """Also on a block of the pair that is not square."""
    z, valid, weights = (
        pair(1, 8, 16, (2,)),
        mask(2, 8, (2,)),
        params("triangle_multiplication", 3, 16),
    )
    how = dict(implementation=implementation)

    def staged(z, weights, direction):
        a, b = genie_tk_jax.gated_projection(z, valid, weights, **how)
        rows = a[:, :, :3] if direction == "outgoing" else a[..., :3]
        t = genie_tk_jax.contract(rows, b, direction, **how)
        return genie_tk_jax.gated_output(
            t, z[:, :3], weights, residual=True, mask=valid[:, :3], **how
        )

    for direction in ("outgoing", "incoming"):

        def whole(z, weights, direction=direction):
            out = genie_tk_jax.triangle_multiplication(
                z, valid, weights, direction=direction, residual=True, implementation="xla"
            )
            return out[:, :3]

        assert distance(staged(z, weights, direction), whole(z, weights)) < 1e-6
        ours, theirs = (
            jax.grad(lambda z, w, f=f: jnp.sum(jnp.sin(f(z, w))), (0, 1))(z, weights)
            for f in (partial(staged, direction=direction), whole)
        )
        assert distance(ours, theirs) < 1e-6


@layers
def test_second_derivatives_of_the_staged_path_are_refused(op, how):
    z, weights = pair(1, 4, 8), params(op, 3, 8)

    def scalar(z):
        return jnp.sum(jnp.sin(getattr(genie_tk_jax, op)(z, None, weights, **how)))

    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        jax.grad(lambda z: jnp.sum(jax.grad(scalar)(z)))(z)


@layers
def test_xla_has_forward_mode_and_second_derivatives(op, how):
    z, weights = pair(1, 4, 8), params(op, 3, 8)
    layer = getattr(genie_tk_jax, op)

    def scalar(z):
        return jnp.sum(jnp.sin(layer(z, None, weights, **how, implementation="xla")))

    v = pair(5, 4, 8)
    _, along = jax.jvp(scalar, (z,), (v,))
    gradient = jax.grad(scalar)(z)
    np.testing.assert_allclose(along, jnp.vdot(gradient, v), rtol=1e-4)
    _, hessian_v = jax.jvp(jax.grad(scalar), (z,), (v,))
    assert np.isfinite(hessian_v).all() and np.abs(hessian_v).max() > 0
