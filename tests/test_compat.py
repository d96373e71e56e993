"""Other libraries' functions: the oracle's values, their own results where they are installed."""

import host_layers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import mask, pair
from host_layers import LAYERS, MULTIPLICATION, C

from genie_tk_jax import convert
from genie_tk_jax.compat import cuequivariance, tokamax

N = 6
directions = pytest.mark.parametrize("direction", MULTIPLICATION)
close = dict(rtol=2e-5, atol=2e-5)


def theirs(name):
    return pytest.importorskip(name, reason=f"compares with {name}, which is not installed")


def cuequivariance_weights(direction, bias=True):
    p = host_layers.leaves("cuequivariance", direction)
    return {k: v for k, v in p.items() if bias or "norm" in k or k.endswith("weight")}


def core(seed, rows=3, queries=4, keys=5, dtype=jnp.float32):
    """q, k, v, bias and mask in cuEquivariance's layout; in row 0 of entry 0 no key is valid."""
    rng = np.random.default_rng(seed)
    b, h, d = 2, 2, 8
    q = rng.normal(size=(b, rows, h, queries, d))
    k, v = rng.normal(size=(2, b, rows, h, keys, d))
    bias = rng.normal(size=(b, 1, h, queries, keys))
    valid = rng.random((b, rows, 1, 1, keys)) < 0.7
    valid[..., 0] = True
    valid[0, 0] = False
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(bias, jnp.float32), valid


@directions
@pytest.mark.parametrize("bias", [True, False])
def test_cuequivariance_multiplication(direction, bias):
    z, valid, p = pair(0, N, C, batch=(2,)), mask(1, N), cuequivariance_weights(direction, bias)
    out = cuequivariance.triangle_multiplicative_update(z, direction, mask=valid, **p)
    tree = convert.to_canonical(p, "cuequivariance", LAYERS[direction])
    for entry, result in zip(z, out, strict=True):
        expected = oracle.triangle_multiplication(entry, valid, tree, direction)
        np.testing.assert_allclose(result, expected, **close)


def test_cuequivariance_norms_default_to_ones_and_zeros():
    z, p = pair(0, N, C), cuequivariance_weights("outgoing")
    plain = {k: v for k, v in p.items() if not k.startswith("norm")}
    for name in ("norm_in", "norm_out"):
        p |= {f"{name}_weight": np.ones(C), f"{name}_bias": np.zeros(C)}
    update = cuequivariance.triangle_multiplicative_update
    np.testing.assert_array_equal(update(z, **plain), update(z, **p))


@directions
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cuequivariances_own_multiplication_agrees(direction, dtype):
    library = theirs("cuequivariance_jax")
    z, valid, p = pair(0, N, C, (2,), dtype), mask(1, N, (2,)), cuequivariance_weights(direction)
    p = {k: jnp.asarray(v) for k, v in p.items()}
    how = dict(direction=direction, mask=jnp.asarray(valid), eps=1e-4, **p)
    ours = cuequivariance.triangle_multiplicative_update(z, **how)
    expected = library.triangle_multiplicative_update(z, **how, fallback=True)
    assert ours.dtype == expected.dtype == dtype
    tolerance = close if dtype == jnp.float32 else dict(rtol=0.1, atol=0.3)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, expected)), **tolerance)


@pytest.mark.parametrize("scale", [8**-0.5, 0.37])
def test_cuequivariance_attention(scale):
    q, k, v, bias, valid = core(0)
    out, lse, peak = cuequivariance.triangle_attention(q, k, v, bias, valid, scale)
    logits = scale * np.einsum("bnhqd,bnhkd->bnhqk", *(np.asarray(x, float) for x in (q, k)))
    logits = np.where(valid, logits + np.asarray(bias, float), -1e9)
    top = logits.max(-1, keepdims=True)
    total = np.exp(logits - top).sum(-1, keepdims=True)
    np.testing.assert_allclose(peak, top, **close)
    np.testing.assert_allclose(lse, np.log(total), **close)
    assert {lse.dtype, peak.dtype} == {jnp.dtype("float32")}
    expected = np.exp(logits - top) / total @ np.asarray(v, float)
    expected[0, 0] = 0
    np.testing.assert_allclose(out, expected, **close)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_cuequivariances_own_attention_agrees(dtype, masked):
    library = theirs("cuequivariance_jax")
    *operands, valid = core(0, dtype=dtype)
    valid = jnp.asarray(valid) if masked else None
    ours = cuequivariance.triangle_attention(*operands, valid, 0.37)
    expected = library.triangle_attention(*operands, valid, 0.37)
    assert type(ours) is type(expected)
    tolerance = close if dtype == jnp.float32 else dict(rtol=2e-2, atol=2e-2)
    for x, y, whole in zip(ours, expected, (False, True, True), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        # Where no key is valid they give the mean of v and we zeros; lse and max agree there too.
        x, y = (np.asarray(z if whole or not masked else z[1:], np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, **tolerance)


def test_cuequivariance_attention_gradients_and_transformations():
    q, k, v, bias, valid = core(1)
    seed = np.random.default_rng(2).normal(size=q.shape)

    def loss(q, k, v, bias):
        out, lse, peak = cuequivariance.triangle_attention(q, k, v, bias, valid, 0.37)
        return jnp.sum(out * seed) + jnp.sum(lse) + jnp.sum(peak)

    def reference(q, k, v, bias):
        logits = jnp.where(valid, 0.37 * q @ k.swapaxes(-1, -2) + bias, -jnp.inf)
        weights = jnp.where(valid, jax.nn.softmax(jnp.where(valid, logits, -1e9), axis=-1), 0)
        return jnp.sum(weights @ v * seed)

    ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)
    expected = jax.grad(reference, argnums=(0, 1, 2, 3))(q, k, v, bias)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, **close)

    def call(q, k, v, bias, valid):
        return cuequivariance.triangle_attention(q, k, v, bias, valid, 0.37)

    two = [jnp.stack([x, 2 * x]) for x in (q, k, v, bias)]
    mapped = jax.vmap(call, in_axes=(0, 0, 0, 0, None))(*two, valid)
    for i in range(2):
        for x, y in zip(mapped, call(*(x[i] for x in two), valid), strict=True):
            np.testing.assert_allclose(x[i], y, **close)


def test_unused_results_cost_nothing_under_jit():
    q, k, v, bias, valid = core(1)

    def flops(results):
        def call(q, k, v):
            return cuequivariance.triangle_attention(q, k, v, bias, valid, 0.37)[:results]

        return jax.jit(call).lower(q, k, v).compile().cost_analysis()["flops"]

    assert flops(2) > flops(1)


@directions
def test_tokamax_multiplication(direction):
    z, valid, p = pair(0, N, C), mask(1, N), host_layers.leaves("tokamax", direction)
    out = tokamax.triangle_multiplication(z, valid, **p, triangle_type=direction)
    tree = convert.to_canonical(p, "tokamax", LAYERS[direction])
    expected = oracle.triangle_multiplication(z, valid, tree, direction, epsilon=1e-6)
    np.testing.assert_allclose(out, expected, **close)
    named = tokamax.triangle_multiplication(
        z, valid, **p, triangle_type=direction, implementation=("triton", "xla")
    )
    np.testing.assert_allclose(named, out, **close)


@directions
def test_tokamaxs_own_multiplication_agrees(direction):
    library = theirs("tokamax")
    z, valid, p = pair(0, N, C), mask(1, N), host_layers.leaves("tokamax", direction)
    p = {k: jnp.asarray(v) for k, v in p.items()}
    how = dict(triangle_type=direction, implementation="xla")
    ours = tokamax.triangle_multiplication(z, jnp.asarray(valid), **p, **how)
    expected = library.triangle_multiplication(z, jnp.asarray(valid), **p, **how)
    np.testing.assert_allclose(ours, expected, **close)


@pytest.mark.parametrize(
    "by, error, words",
    [
        (dict(direction="inward"), ValueError, "direction must be one of 'outgoing', 'incoming'"),
        (dict(p_in_weight=None), ValueError, "p_in_weight must be given"),
        (dict(p_out_weight=np.ones((6, C))), ValueError, "6 does not go with c_z = 8"),
        (dict(precision=cuequivariance.TriMulPrecision.IEEE), NotImplementedError, "'highest'"),
        (dict(precision=9), ValueError, "precision must be one of"),
        (dict(fallback=False), NotImplementedError, "implementation='cuda'"),
    ],
)
def test_what_the_multiplication_cannot_honour(by, error, words):
    z, p = pair(0, N, C), cuequivariance_weights("outgoing")
    with pytest.raises(error, match=words):
        cuequivariance.triangle_multiplicative_update(z, **{**p, **by})


def test_precision_that_is_set_is_honoured():
    z, p = pair(0, N, C), cuequivariance_weights("outgoing")
    update = cuequivariance.triangle_multiplicative_update
    with jax.default_matmul_precision("highest"):
        update(z, **p, precision=cuequivariance.TriMulPrecision.IEEE)
        tokamax_weights = host_layers.leaves("tokamax", "outgoing")
        tokamax.triangle_multiplication(
            z, None, **tokamax_weights, triangle_type="outgoing", precision=jax.lax.Precision.HIGH
        )
    update(z.astype(jnp.bfloat16), **p, precision=cuequivariance.TriMulPrecision.IEEE)


@pytest.mark.parametrize(
    "at, value, error, words",
    [
        (0, np.ones((2, 3, 4)), ValueError, "q must be an array of five axes"),
        (3, np.ones((2, 3, 2, 4, 5)), ValueError, r"bias must be \[B, 1, H, Q, K\]"),
        (4, np.ones((2, 3, 5), bool), ValueError, r"mask must be \[B, N, 1, 1, K\]"),
        (5, "a", ValueError, "could not convert"),
        (5, [1.0], TypeError, "scale must be a Python number"),
        (6, jax.lax.Precision.HIGHEST, NotImplementedError, "asks for more than"),
        (6, "TF64", NotImplementedError, "is not one that these layers can follow"),
    ],
)
def test_what_the_attention_cannot_honour(at, value, error, words):
    arguments = [*core(0), 0.37, None]
    arguments[at] = value
    with pytest.raises(error, match=words):
        cuequivariance.triangle_attention(*arguments)


def test_what_tokamax_shim_cannot_honour():
    z, p = pair(0, N, C), host_layers.leaves("tokamax", "outgoing")
    for names, error, words in (
        ("triton", NotImplementedError, "'triton' is tokamax's own"),
        ((), ValueError, "must name at least one"),
    ):
        with pytest.raises(error, match=words):
            tokamax.triangle_multiplication(
                z, None, **p, triangle_type="outgoing", implementation=names
            )
