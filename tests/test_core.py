"""The attention core against the float64 oracle: values, gradients, absent operands."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import core, distance, implementations

import genie_tk_jax


@implementations
@pytest.mark.parametrize("rows, queries, keys", [(1, 1, 1), (5, 7, 7), (3, 4, 9), (4, 9, 2)])
def test_core_equals_the_oracle(implementation, rows, queries, keys, float64):
    *operands, valid = core(1, rows, queries, keys, dtype=float64)
    out = genie_tk_jax.pair_attention(*operands, valid, implementation=implementation)
    assert distance(out, oracle.pair_attention(*operands, valid)) < 1e-13
    assert not np.asarray(out)[0].any()


@implementations
@pytest.mark.parametrize("peaked", [1.0, 50.0])
def test_core_gradients_equal_central_differences(implementation, peaked, float64):
    *operands, valid = core(1, 4, 5, 6, dtype=float64)
    operands[3] = operands[3] * peaked
    cotangent = np.random.default_rng(2).normal(size=operands[0].shape)

    def scalar(*operands):
        out = genie_tk_jax.pair_attention(*operands, valid, implementation=implementation)
        return jnp.sum(out * cotangent)

    gradients = jax.grad(scalar, argnums=(0, 1, 2, 3))(*operands)
    for d in gradients[:3]:
        assert not np.asarray(d)[0].any(), "a row without a valid key has gradients of zero"
    directions, along = [], []
    for index, gradient in enumerate(gradients):
        direction = [np.zeros(x.shape) for x in operands]
        direction[index] = np.random.default_rng(index).normal(size=operands[index].shape)
        directions.append(direction)
        along.append(np.vdot(gradient, direction[index]))
    expected = oracle.central_difference(
        lambda operands: oracle.pair_attention(*operands, valid),
        list(operands),
        cotangent,
        directions,
    )
    np.testing.assert_allclose(along, expected, rtol=2e-6, atol=1e-7)


@implementations
def test_core_without_bias_or_mask(implementation, float64):
    q, k, v, bias, valid = core(1, 3, 4, 5, dtype=float64)
    out = genie_tk_jax.pair_attention(q, k, v, None, None, implementation=implementation)
    expected = oracle.pair_attention(q, k, v, bias * 0, valid | True)
    assert distance(out, expected) < 1e-13
    gradient = jax.grad(
        lambda q: jnp.sum(jnp.sin(genie_tk_jax.pair_attention(q, k, v, None, valid)))
    )
    assert np.isfinite(gradient(q)).all()
