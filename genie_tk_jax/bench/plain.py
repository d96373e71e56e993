"""The layers as a user without this library would write them: plain, unchunked XLA.

Every product runs and rounds in the dtype of its operands; statistics and softmax are float32.
They are the yardstick of accuracy, and the shell round attention cores of other libraries.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

EPSILON = 1e-5
Core = Callable[..., jax.Array]


def layer_norm(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """Layer norm over the last axis, rounded to x's dtype."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + EPSILON) * params["scale"] + params["bias"]
    return y.astype(x.dtype)


def multiplication(z: jax.Array, mask: jax.Array, params: Any, direction: str) -> jax.Array:
    """Triangle multiplication, channels last: z [N, N, C], mask bool [N, N]."""
    x = layer_norm(z, params["norm_in"])
    gate = jax.nn.sigmoid(x @ params["gate_in"]["kernel"])
    ab = gate * (x @ params["proj_in"]["kernel"]) * mask[..., None]
    a, b = jnp.split(ab, 2, axis=-1)
    t = jnp.einsum({"outgoing": "ikc,jkc->ijc", "incoming": "kic,kjc->ijc"}[direction], a, b)
    y = layer_norm(t, params["norm_out"]) @ params["proj_out"]["kernel"]
    return jax.nn.sigmoid(x @ params["gate_out"]["kernel"]) * y


def core(q, k, v, bias, mask) -> jax.Array:
    """q, k, v [I, J, H, D], bias [H, Q, K], mask bool [I, K]; all logits at once."""
    logits = jnp.einsum("iqhd,ikhd->ihqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    logits = jnp.where(mask[:, None, None, :], logits + bias, -1e9)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("ihqk,ikhd->iqhd", weights, v)


def project(z: jax.Array, params: Any) -> tuple[jax.Array, ...]:
    """z [I, J, C] -> q, k, v [I, J, H, D], bias [H, I, J]."""
    x = layer_norm(z, params["norm"])
    q, k, v = (jnp.einsum("ijc,chd->ijhd", x, params[name]["kernel"]) for name in "qkv")
    return q, k, v, jnp.einsum("ijc,ch->hij", x, params["pair_bias"]["kernel"])


def output(o: jax.Array, z: jax.Array, params: Any) -> jax.Array:
    """o [I, J, H, D], z [I, J, C] -> the update."""
    x = layer_norm(z, params["norm"])
    gate = jax.nn.sigmoid(jnp.einsum("ijc,chd->ijhd", x, params["gate"]["kernel"]))
    return jnp.einsum("ijhd,hdc->ijc", gate * o, params["out"]["kernel"])


def attention(z: jax.Array, mask: jax.Array, params: Any, node: str, attend: Core = core):
    """Triangle attention round any core; the ending node is the starting one on swapped axes."""
    if node == "ending":
        z, mask = jnp.swapaxes(z, 0, 1), mask.T
    update = output(attend(*project(z, params), mask), z, params)
    return jnp.swapaxes(update, 0, 1) if node == "ending" else update
