"""The arithmetic that all references share: what XLA runs, and what kernels are judged against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def statistics_dtype(dtype: Any) -> Any:
    """The dtype of statistics, logits and sums for data of `dtype`: float32, or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def readable(z: jax.Array, mask: jax.Array | None) -> jax.Array:
    """z with masked pairs that hold inf or NaN read as zeros, so that no garbage spreads.

    Args:
      z: [..., C].
      mask: bool [...], or None.
    """
    if mask is None:
        return z
    # One sum finds inf, NaN and values so large that their mean would overflow.
    size = jnp.sum(jnp.abs(z.astype(statistics_dtype(z.dtype))), axis=-1)
    return jnp.where((mask | jnp.isfinite(size))[..., None], z, 0)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm over the last axis with two-pass statistics in float32, rounded to x's dtype."""
    wide = x.astype(statistics_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon) * scale + bias
    return y.astype(x.dtype)


def linear(equation: str, x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """The product of x and the kernel in x's dtype; a bias is added in float32.

    Args:
      equation: einsum of x and kernel; the outputs come last.
    """
    y = jnp.einsum(equation, x, weights["kernel"].astype(x.dtype))
    if "bias" in weights:
        y = (y.astype(statistics_dtype(x.dtype)) + weights["bias"]).astype(x.dtype)
    return y


# A chunk of rows holds at most this many numbers in its largest temporary, 0.13 GB in float32.
AT_ONCE = 2**25


def over_rows(function: Callable, numbers: int, operands: tuple) -> Any:
    """Maps `function` over axis 1 of operands (or None), a chunk of rows at a time.

    Autodiff runs each chunk again in the backward pass, so that memory stays that of one chunk.

    Args:
      numbers: how many numbers the largest temporary of one row holds.
    """
    rows = max(1, AT_ONCE // max(1, numbers))
    by_row = [None if x is None else jnp.moveaxis(x, 1, 0) for x in operands]
    results = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), by_row, batch_size=rows)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), results)


def wide(weights: Any) -> Any:
    """Weights in float32 or wider, so that their gradients sum in it."""
    return jax.tree.map(lambda w: w.astype(statistics_dtype(w.dtype)), weights)


def like(gradients: Any, weights: Any) -> Any:
    """Gradients of weights [B, ...], summed over B, in the weights' dtypes."""
    return jax.tree.map(lambda g, w: jnp.sum(g, axis=0).astype(w.dtype), gradients, weights)


def pullback(
    reference: Callable,
    arrays: tuple,
    constants: tuple,
    weights: Any,
    cotangents: Any,
    *,
    in_turn: bool = False,
) -> tuple[Any, Any]:
    """Gradients of a stage's reference, by autodiff, those of weights one for each batch entry.

    Args:
      reference: `reference((*arrays, *constants), weights)`.
      arrays: the operands to differentiate, [B, ...] each.
      constants: the operands behind them, [B, ...] or None.
      weights: a pytree of weights without a batch axis.
      cotangents: like the results.
      in_turn: one batch entry after the other, for references that fill the memory with one.

    Returns:
      Gradients of `arrays`, and of `weights` as float32 [B, ...].
    """

    def one(entry):
        arrays, constants, cotangents = jax.tree.map(lambda x: x[None], entry)
        _, pull = jax.vjp(lambda a, w: reference((*a, *constants), w), arrays, wide(weights))
        d_arrays, d_weights = pull(cotangents)
        return jax.tree.map(lambda x: x[0], d_arrays), d_weights

    entries = (arrays, constants, cotangents)
    return jax.lax.map(one, entries) if in_turn else jax.vmap(one)(entries)
