"""The pair stack: the four triangle layers and the transition, with AlphaFold 2's sizes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax import (
    init_triangle_attention,
    init_triangle_multiplication,
    triangle_attention,
    triangle_multiplication,
)

C_Z = 128
NO_HEADS = 4
TRANSITION_FACTOR = 4


class Layer(NamedTuple):
    """One layer of a block: init(key) gives its parameters, apply(z, mask, params) its update."""

    name: str
    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]


def transition(z, mask, params, *, implementation=None):
    """LayerNorm, linear to four times the channels, relu, linear back; [N, N, C] in z's dtype.

    There is one implementation and it reads no mask; it takes both arguments so that the five
    layers of a block are called alike.

    Source: Jumper et al. 2021, supplementary Algorithm 15.
    """
    del mask, implementation
    x = z.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
    x = (x * params["norm"]["scale"] + params["norm"]["bias"]).astype(z.dtype)
    hidden = jax.nn.relu(_linear(x, params["expand"]))
    return _linear(hidden, params["contract"])


def init_transition(key: jax.Array, c_z: int) -> dict[str, dict[str, jax.Array]]:
    """Random float32 parameters of `transition`, none of them zero."""
    wide = TRANSITION_FACTOR * c_z
    norm, expand, contract = jax.random.split(key, 3)
    scale, bias = 0.1 * jax.random.normal(norm, (2, c_z))
    return {
        "norm": {"scale": 1.0 + scale, "bias": bias},
        "expand": _init_linear(expand, c_z, wide),
        "contract": _init_linear(contract, wide, c_z),
    }


def _linear(x, params):
    """Sums in float32 and rounds once; weights are read in x's dtype."""
    kernel = params["kernel"].astype(x.dtype)
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + params["bias"]
    return y.astype(x.dtype)


def _init_linear(key: jax.Array, c_in: int, c_out: int) -> dict[str, jax.Array]:
    kernel, bias = jax.random.split(key)
    return {
        "kernel": jax.random.normal(kernel, (c_in, c_out)) / c_in**0.5,
        "bias": 0.1 * jax.random.normal(bias, (c_out,)),
    }


_init_multiplication = partial(init_triangle_multiplication, c_z=C_Z, c_hidden=C_Z, init="random")
_init_attention = partial(
    init_triangle_attention, c_in=C_Z, c_hidden=C_Z // NO_HEADS, no_heads=NO_HEADS, init="random"
)

# In the order of Algorithm 6, lines 6 to 10.
BLOCK = (
    Layer(
        "multiplication, outgoing",
        _init_multiplication,
        partial(triangle_multiplication, direction="outgoing"),
    ),
    Layer(
        "multiplication, incoming",
        _init_multiplication,
        partial(triangle_multiplication, direction="incoming"),
    ),
    Layer(
        "attention, starting node", _init_attention, partial(triangle_attention, node="starting")
    ),
    Layer("attention, ending node", _init_attention, partial(triangle_attention, node="ending")),
    Layer("transition", partial(init_transition, c_z=C_Z), transition),
)
