"""How ops hand their operands to CUDA kernels, and the words in which a kernel refuses them."""

from typing import Any

import jax
import jax.numpy as jnp

from genie_tk_jax import _dispatch

Linear = dict[str, jax.Array]


def kernels(dtype: Any, *linears: Linear) -> tuple[jax.Array, ...]:
    """The kernels of linear layers: all float32, or all of `dtype`."""
    found = [linear["kernel"] for linear in linears]
    whole = all(kernel.dtype == jnp.float32 for kernel in found)
    return tuple(kernel if whole else kernel.astype(dtype) for kernel in found)


def biases(*linears: Linear) -> tuple[jax.Array | None, ...]:
    """The biases of linear layers: float32, or None where absent."""
    found = [linear.get("bias") for linear in linears]
    return tuple(None if bias is None else bias.astype(jnp.float32) for bias in found)


def norms(*groups: Linear) -> tuple[jax.Array, ...]:
    """Scale and bias of each layer norm, float32."""
    return tuple(group[name].astype(jnp.float32) for group in groups for name in ("scale", "bias"))


# Kernels move channel-first arrays by TMA, which wants rows to start at multiples of 16 bytes.
PADDING = 8


def padding() -> int:
    """What channel-first arrays round their pair axes up to: 1 where no kernel can read them.

    There a device's part of an axis has one size in all arrays, so that any part may be sharded.
    """
    return PADDING if _dispatch.kernels_absent() is None else 1


def padded(x: jax.Array, axes: int = 2) -> jax.Array:
    """x with its last axes rounded up to multiples of `padding()` by zeros: [.., I, K] for two."""
    multiple = padding()
    missing = [(0, 0)] * (x.ndim - axes) + [(0, -size % multiple) for size in x.shape[-axes:]]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


# Blocks sum gradients of weights over pairs: as many blocks as the largest GPU runs at once, of at
# least two tiles of 64 pairs each.
BLOCKS, TILE, TILES_PER_PART = 132, 64, 2


def parts(pairs: tuple[int, ...], blocks: int = BLOCKS) -> int:
    """Into how many sums the pairs [B, I, J] of each batch entry are split."""
    batch, rows, columns = pairs
    return max(1, min(blocks // max(1, batch), rows * -(-columns // TILE) // TILES_PER_PART))


def unserved_dtype(name: str, x: jax.Array) -> str | None:
    """Why no kernel serves the dtype of `x`, or None."""
    if x.dtype in (jnp.bfloat16, jnp.float16):
        return None
    return f"{name} must be bfloat16 or float16; got {x.dtype}"


def unserved_width(widths: dict[str, int], served: tuple[int, ...]) -> str | None:
    """Why no kernel serves one of these widths, by their names, or None."""
    for name, width in widths.items():
        if width not in served:
            return f"{name} must be one of {served}; got {width}"
    return None
