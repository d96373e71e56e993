"""The stages around the attention core in a triangle attention layer: project, and output.

Between them the core's logits are in units of log 2: q carries log2(e) / sqrt(D) and the bias
log2(e), each folded in before its one rounding.
"""

import math

import jax
import jax.numpy as jnp

from genie_tk_jax import _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage

PROJECT_GROUPS = ("norm", "pair_bias", "q", "k", "v")
OUTPUT_GROUPS = ("norm", "gate", "out")
WIDTHS = (64, 128, 256)
MOST_HEADS = 16


def oriented(x, node):
    """x [B, I, J, ...] with the axis attended over last of the two pair axes."""
    return x if x is None or node == "starting" else jnp.swapaxes(x, 1, 2)


def normed(z, mask, weights, epsilon):
    """z [B, J, C] of one row, its garbage read as zeros, and its layer norm."""
    z = _reference.readable(z, mask)
    return z, _reference.layer_norm(z, **weights["norm"], epsilon=epsilon)


def _over_pairs(row, *operands):
    """`row` over the rows of pairwise operands, the first [B, I, J, C], in chunks."""
    batch, _, columns, channels = operands[0].shape
    return _reference.over_rows(row, 4 * batch * columns * channels, operands)


def _folded(equation, x, weights, factor):
    """The product of x and the kernel, times `factor` before it is rounded."""
    wide = _reference.statistics_dtype(x.dtype)
    y = jnp.einsum(equation, x, weights["kernel"].astype(x.dtype), preferred_element_type=wide)
    return (factor * y).astype(x.dtype)


def bias_of_pairs(arrays, weights, *, node, ending_bias, epsilon):
    """z [B, N, N, C], mask -> the pair bias [B, H, Q, K] in attention order, K rounded up."""
    z, mask = arrays
    if ending_bias == "swapped":
        z, mask = oriented(z, node), oriented(mask, node)

    def row(z, mask):
        _, x = normed(z, mask, weights, epsilon)
        return _folded("bkc,ch->bkh", x, weights["pair_bias"], math.log2(math.e))

    return _operands.padded(jnp.moveaxis(_over_pairs(row, z, mask), -1, 1), 1)


def queries_keys_values(x, weights):
    """x [B, J, C] -> q, k, v [B, J, H, D]."""
    factor = math.log2(math.e) / math.sqrt(weights["q"]["kernel"].shape[-1])
    q = _folded("bjc,chd->bjhd", x, weights["q"], factor)
    return q, *(_reference.linear("bjc,chd->bjhd", x, weights[name]) for name in "kv")


def gated(o, z, x, weights, residual):
    """One row: o [B, J, H, D] and z, LayerNorm(z) [B, J, C] -> the update, or z + update."""
    gate = jax.nn.sigmoid(_reference.linear("bjc,chd->bjhd", x, weights["gate"]))
    update = _reference.linear("bjhd,hdc->bjc", gate * o, weights["out"])
    return z + update if residual else update


def projections(arrays, weights, *, node, ending_bias, epsilon):
    """z [B, N, N, C], mask -> q, k, v [B, I, J, H, D] in attention order, bias [B, H, Q, Kp]."""
    z, mask = arrays

    def row(z, mask):
        return queries_keys_values(normed(z, mask, weights, epsilon)[1], weights)

    bias = bias_of_pairs(arrays, weights, node=node, ending_bias=ending_bias, epsilon=epsilon)
    return *_over_pairs(row, oriented(z, node), oriented(mask, node)), bias


def _output(arrays, weights, *, node, residual, epsilon):
    """o [B, I, J, H, D] in attention order, z [B, N, N, C], mask -> [B, N, N, C]."""
    o, z, mask = arrays

    def row(z, mask, o):
        z, x = normed(z, mask, weights, epsilon)
        return gated(o, z, x, weights, residual)

    return _over_pairs(row, z, mask, oriented(o, node))


def _unsupported(z, kernel) -> str | None:
    """Why no kernel serves z [B, I, J, C] and a projection's kernel [C, H, D], or None."""
    channels, heads, width = kernel.shape
    widths = {"c_in": channels, "no_heads * c_hidden": heads * width}
    return _operands.unserved_dtype("z", z) or _operands.unserved_width(widths, WIDTHS)


def _project_unsupported(arrays, weights, **_) -> str | None:
    kernel = weights["q"]["kernel"]
    if kernel.shape[1] > MOST_HEADS:
        return f"no_heads must be at most {MOST_HEADS}; got {kernel.shape[1]}"
    return _unsupported(arrays[0], kernel)


def _output_unsupported(arrays, weights, **_) -> str | None:
    kernel = weights["gate"]["kernel"]
    if kernel.size > 128 * 256:
        return (
            "c_in and no_heads * c_hidden must not both be 256: the weights outgrow shared memory"
        )
    return _unsupported(arrays[1], kernel)


def _project_kernel(arrays, weights, *, node, ending_bias, epsilon):
    z, mask = arrays
    batch, rows, columns, _ = z.shape
    _, heads, width = weights["q"]["kernel"].shape
    ending, as_z = node == "ending", ending_bias == "unswapped"
    i, j = (columns, rows) if ending else (rows, columns)
    queries, keys = (rows, columns) if as_z else (i, j)
    keys += -keys % _operands.PADDING
    attended = jax.ShapeDtypeStruct((batch, i, j, heads, width), z.dtype)
    bias = jax.ShapeDtypeStruct((batch, heads, queries, keys), z.dtype)
    return _ffi.call(
        "genie_attention_project_fwd",
        (attended, attended, attended, bias),
        z,
        mask,
        *_operands.norms(weights["norm"]),
        *_operands.kernels(z.dtype, *(weights[name] for name in ("q", "k", "v", "pair_bias"))),
        ending=ending,
        bias_as_z=as_z,
        epsilon=epsilon,
    )


def _output_kernel(arrays, weights, *, node, residual, epsilon):
    o, z, mask = arrays
    linears = weights["gate"], weights["out"]
    return _ffi.call(
        "genie_attention_output_fwd",
        jax.ShapeDtypeStruct(z.shape, z.dtype),
        o,
        z,
        mask,
        *_operands.norms(weights["norm"]),
        *_operands.kernels(z.dtype, *linears),
        *_operands.biases(*linears),
        ending=node == "ending",
        residual=residual,
        epsilon=epsilon,
    )


def project(z: str, attended: str, bias: str, whole: str):
    """The stage z, mask -> q, k, v, bias, given the axes of each."""
    pair, padded = z.removesuffix(" c"), bias[-1]
    return stage(
        "attention_project",
        projections,
        f"{z}, {pair} -> {attended}, {attended}, {attended}, {bias}",
        whole=whole,
        padded=padded,
        kernel=Kernel(_project_kernel, _project_unsupported),
    )


def output(z: str, attended: str, whole: str):
    """The stage o, z, mask -> the update of z, given the axes of each."""
    pair = z.removesuffix(" c")
    return stage(
        "attention_output",
        _output,
        f"{attended}, {z}, {pair} -> {z}",
        whole=whole,
        kernel=Kernel(_output_kernel, _output_unsupported),
    )
