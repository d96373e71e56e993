"""The contraction's kernels: values and gradients against float64, bits, masks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance

from genie_tk_jax import contract, explain
from genie_tk_jax.ops import contract as stages
from genie_tk_jax.ops.contract import DIRECTIONS

pytestmark = pytest.mark.gpu

EQUATIONS = {"outgoing": "bhik,bhjk->bhij", "incoming": "bhki,bhkj->bhij"}


def edges(direction, i, j, k, dtype=jnp.bfloat16, batch=2, channels=3):
    rng = np.random.default_rng(i + j + k)
    shapes = [(k, n) if direction == "incoming" else (n, k) for n in (i, j)]
    a, b = (jnp.asarray(rng.normal(size=(batch, channels, *s)), dtype) for s in shapes)
    return a, b, jnp.asarray(rng.normal(size=(batch, channels, i, j)), dtype)


def same_bits(ours, expected):
    """Tells how many elements differ, and where; what is compared is finite."""
    ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (77, 77, 77), (129, 40, 200), (384, 300, 520)])
def test_is_as_exact_as_xla(direction, sizes):
    a, b, dt = edges(direction, *sizes)
    equation = EQUATIONS[direction]

    def run(implementation):
        t, pull = jax.vjp(
            partial(contract, direction=direction, implementation=implementation), a, b
        )
        return t, *pull(dt)

    x, y, d = (np.asarray(v, np.float64) for v in (a, b, dt))
    left, right, result = equation.replace("->", ",").split(",")
    truth = (
        np.einsum(equation, x, y),
        np.einsum(f"{result},{right}->{left}", d, y),
        np.einsum(f"{left},{result}->{right}", x, d),
    )
    for ours, again, theirs, exact in zip(run("cuda"), run("cuda"), run("xla"), truth, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert distance(ours, exact) <= 1.05 * distance(theirs, exact) + 1e-6
        same_bits(ours, again)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float16_cannot_overflow(direction):
    a, b, _ = edges(direction, 77, 129, 200, jnp.float16)
    a, b = a * 300, b * 300
    t = contract(a, b, direction, implementation="cuda")
    assert t.dtype == jnp.float32 and np.abs(t).max() > 65504
    truth = np.einsum(EQUATIONS[direction], *(np.asarray(x, np.float64) for x in (a, b)))
    assert distance(t, truth) < 1e-6
    gradient = jax.grad(lambda a: contract(a, b, direction).sum())
    assert [str(c.implementation) for c in explain(gradient, a)] == ["cuda", "xla"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("valid", [0, 200, 520])
def test_masks_skip_only_zeros(direction, valid, monkeypatch):
    monkeypatch.setattr(stages, "WORTH_A_MASK", 0)
    a, b, dt = edges(direction, 520, 520, 520)
    mask = np.random.default_rng(0).random((2, 520, 520)) < 0.9
    mask[:, valid:] = mask[:, :, valid:] = False
    a, b = (x * mask[:, None] for x in (a, b))
    static = dict(direction=direction, implementation="cuda")
    masked = stages.forward(a, b, mask, **static), *stages.backward(a, b, dt, mask, **static)
    plain = stages.forward(a, b, None, **static), *stages.backward(a, b, dt, None, **static)
    same_bits(masked[0], plain[0])
    for ours, whole in zip(masked[1:], plain[1:], strict=True):
        same_bits(ours * mask[:, None], whole * mask[:, None])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_changes_no_bit(direction):
    a, b, _ = edges(direction, 77, 77, 77)
    t = contract(a, b, direction, implementation="cuda")
    wide = [jnp.pad(x, [(0, 0), (0, 0), (0, 300), (0, 300)]) for x in (a, b)]
    padded = contract(*wide, direction, implementation="cuda")
    assert np.array_equal(t, padded[..., :77, :77])
