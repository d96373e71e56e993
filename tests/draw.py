"""Random inputs in which everything matters: asymmetric masks, no leaf zero or constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genie_tk_jax

MULTIPLICATION = [("outgoing", {}), ("incoming", {})]
ATTENTION = [
    ("starting", {}),
    ("ending", {}),
    ("ending", {"ending_bias": "unswapped"}),
]
LAYERS = [
    ("triangle_multiplication", {"direction": "outgoing"}),
    ("triangle_multiplication", {"direction": "incoming"}),
    ("triangle_attention", {"node": "starting"}),
    ("triangle_attention", {"node": "ending"}),
    ("triangle_attention", {"node": "ending", "ending_bias": "unswapped"}),
]
LAYER_IDS = ["outgoing", "incoming", "starting", "ending", "ending-unswapped"]

implementations = pytest.mark.parametrize("implementation", [None, "xla"], ids=["staged", "xla"])


def pair(seed, n, c_z, batch=(), dtype=jnp.float32):
    """z [*batch, N, N, c_z] of size one, with a mean of its own in every pair."""
    values = np.random.default_rng(seed).normal(size=(*batch, n, n, c_z + 1))
    return jnp.asarray(values[..., :-1] + 0.5 * values[..., -1:], dtype)


def mask(seed, n, batch=()):
    """Asymmetric, three in four valid; from N = 4 on one row and one column are all masked."""
    valid = np.random.default_rng(seed).random((*batch, n, n)) < 0.75
    if n > 3:
        valid[..., 1, :] = False
        valid[..., :, n // 2] = False
    return valid


def params(op, seed, c_z, dtype=jnp.float32, use_bias=True):
    """Parameters of a layer in which no leaf is zero or constant; c_hidden differs from c_z."""
    key = jax.random.key(seed)
    how = dict(use_bias=use_bias, init="random", dtype=dtype)
    if op == "triangle_multiplication":
        return genie_tk_jax.init_triangle_multiplication(key, c_z, c_z // 2 + 4, **how)
    return genie_tk_jax.init_triangle_attention(key, c_z, c_z // 4, 3, **how)


def core(seed, rows, queries, keys, heads=2, width=8, batch=(), dtype=jnp.float32):
    """q, k, v, bias and mask of the attention core; row 0 has no valid key, row 1 a single one."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(*batch, rows, queries, heads, width))
    k, v = rng.normal(size=(2, *batch, rows, keys, heads, width))
    bias = rng.normal(size=(*batch, heads, queries, keys))
    valid = rng.random((*batch, rows, keys)) < 0.75
    valid[..., 0, :] = False
    valid[..., 1:2, :] = np.arange(keys) == keys // 2
    return *(jnp.asarray(x, dtype) for x in (q, k, v, bias)), valid


def distance(result, truth):
    """||result - truth|| / ||truth|| over all leaves."""
    pairs = list(zip(jax.tree.leaves(result), jax.tree.leaves(truth), strict=True))
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    error = sum(np.sum((x - y) ** 2) for x, y in wide)
    return np.sqrt(error / max(sum(np.sum(y**2) for _, y in wide), 1e-300))
