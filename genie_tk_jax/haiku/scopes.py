"""Parameters under a host's own scopes, names, shapes, dtypes and initialisers."""

import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

# The deviation of a standard normal truncated at two, in the precision of the hosts' division:
# the initial values are theirs to the bit.
_TRUNCATED = float(np.float32(0.87962566103423978))

Leaves = dict[str, jax.Array]

zeros = hk.initializers.Constant(0.0)
ones = hk.initializers.Constant(1.0)


def fan_in(channels: int) -> hk.initializers.Initializer:
    """Truncated normal of variance 1 / channels."""
    return hk.initializers.TruncatedNormal(stddev=1 / math.sqrt(channels) / _TRUNCATED)


def norm(name: str, channels: int, dtype) -> Leaves:
    """Scale and offset of a layer norm, float32 also where activations are narrower."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    with hk.name_scope(name):
        return {
            "scale": hk.get_parameter("scale", (channels,), dtype, ones),
            "offset": hk.get_parameter("offset", (channels,), dtype, zeros),
        }


def linear(name: str, shape: tuple[int, ...], dtype, weights, bias=None) -> Leaves:
    """Weights of `shape`, and where `bias` is an initialiser a bias for its last axis."""
    with hk.name_scope(name):
        leaves = {"weights": hk.get_parameter("weights", shape, dtype, weights)}
        if bias is not None:
            leaves["bias"] = hk.get_parameter("bias", shape[-1:], dtype, bias)
    return leaves
