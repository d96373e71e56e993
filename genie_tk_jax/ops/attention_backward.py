"""The backward of the stages around the attention core: of the output, and of the projections.

The gate's logits count as one more projection of LayerNorm(z): the backward of the output gives
their gradient, and that of the projections takes it with those of q, k, v and the bias, so that z
is read and differentiated once for all.
"""

import math

import jax
import jax.numpy as jnp

from genie_tk_jax import _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage
from genie_tk_jax.ops import attention_stages
from genie_tk_jax.ops.attention_stages import oriented

OUTPUT_GROUPS = attention_stages.OUTPUT_GROUPS
PROJECT_GROUPS = ("norm", "pair_bias", "q", "k", "v", "gate")
PROJECTIONS = ("q", "k", "v", "gate")
WIDTHS = (64, 128)
HEADS_PADDED = 16  # columns that the kernel sums for the bias


def _gate_logits(z, mask, weights, *, node, epsilon):
    """[B, I, J, H, D] in attention order."""
    _, x = attention_stages.normed(z, mask, weights, epsilon)
    return oriented(_reference.linear("bijc,chd->bijhd", x, weights["gate"]), node)


def _output_backward(arrays, weights, *, node, epsilon):
    """o, z, mask, d_out -> d_o, the gradient of the gate's logits, and of the weights of "out"."""
    o, z, mask, d_out = arrays
    logits = _gate_logits(z, mask, weights, node=node, epsilon=epsilon)

    def update(arrays, out):
        o, logits = arrays
        return _reference.linear("bijhd,hdc->bijc", jax.nn.sigmoid(logits) * o, out)

    (d_o, d_logits), d_out_weights = _reference.pullback(
        update, (o, logits), (), weights["out"], oriented(d_out, node)
    )
    return d_o, d_logits, {"out": d_out_weights}


def _project_backward(arrays, weights, *, node, ending_bias, epsilon):
    """z, mask, dq, dk, dv, d_bias, d_gate, d_out or None -> dz and the gradients of the weights.

    d_out is what a residual adds to dz.
    """
    z, mask, dq, dk, dv, d_bias, d_gate, d_out = arrays

    def projections(arrays, weights):
        z, mask = arrays
        static = {"node": node, "epsilon": epsilon}
        logits = _gate_logits(z, mask, weights, **static)
        made = attention_stages.projections((z, mask), weights, ending_bias=ending_bias, **static)
        read = () if d_out is None else (_reference.readable(z, mask),)
        return *made, logits, *read

    cotangents = (dq, dk, dv, d_bias.astype(z.dtype), d_gate)
    cotangents += () if d_out is None else (d_out,)
    (dz,), d_weights = _reference.pullback(projections, (z,), (mask,), weights, cotangents)
    return dz, d_weights


def unsupported(z, weights) -> str | None:
    """Why the backward kernels cannot serve z and these weights, or None."""
    channels, heads, width = weights["gate"]["kernel"].shape
    if why := _operands.unserved_dtype("z", z):
        return why
    if channels not in WIDTHS or heads * width != channels:
        return (
            f"c_in and no_heads * c_hidden must be one of {WIDTHS} and equal; "
            f"got {channels} and {heads * width}"
        )
    if heads > attention_stages.MOST_HEADS:
        return f"no_heads must be at most {attention_stages.MOST_HEADS}; got {heads}"
    return None


def _output_kernel(arrays, weights, *, node, epsilon):
    o, z, mask, d_out = arrays
    batch, *_, heads, width = o.shape
    channels, parts = z.shape[-1], _operands.parts(o.shape[:3])
    attended = jax.ShapeDtypeStruct(o.shape, o.dtype)
    sums = [(batch, parts, heads * width, channels), (batch, parts, channels)]
    d_o, d_gate, kernel, bias = _ffi.call(
        "genie_attention_output_bwd",
        (attended, attended, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums)),
        o,
        z,
        mask,
        d_out,
        *_operands.norms(weights["norm"]),
        *_operands.kernels(z.dtype, weights["gate"], weights["out"]),
        *_operands.biases(weights["gate"]),
        ending=node == "ending",
        epsilon=epsilon,
    )
    d_out_weights = {"kernel": jnp.sum(kernel, 1).reshape(batch, heads, width, channels)}
    if "bias" in weights["out"]:
        d_out_weights["bias"] = jnp.sum(bias, 1)
    return d_o, d_gate, {"out": d_out_weights}


def _project_kernel(arrays, weights, *, node, ending_bias, epsilon):
    z, mask, dq, dk, dv, d_bias, d_gate, d_out = arrays
    batch, i, j, heads, width = dq.shape
    channels, hidden, parts = (
        z.shape[-1],
        heads * width,
        _operands.parts((batch, i, j), _operands.BLOCKS // 2),
    )
    static = {"ending": node == "ending", "bias_as_z": ending_bias == "unswapped"}
    gradients = dq, dk, dv, d_gate, d_bias
    statistics = jax.ShapeDtypeStruct((batch, i, j, 2), jnp.float32)
    dz, statistics = _ffi.call(
        "genie_attention_project_bwd",
        (jax.ShapeDtypeStruct(z.shape, z.dtype), statistics),
        z,
        mask,
        *gradients,
        d_out,
        _operands.norms(weights["norm"])[0],
        *_operands.kernels(z.dtype, *(weights[name] for name in (*PROJECTIONS, "pair_bias"))),
        epsilon=epsilon,
        **static,
    )
    shapes = [
        (batch, parts, len(PROJECTIONS), channels, hidden),
        (batch, parts, len(PROJECTIONS), hidden),
        (batch, parts, channels, HEADS_PADDED),
        (batch, parts, HEADS_PADDED),
    ]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    sums = _ffi.call("genie_attention_weights_bwd", results, z, statistics, *gradients, **static)
    kernels, totals, bias_kernel, bias_total = (jnp.sum(x, 1) for x in sums)
    products = {name: kernels[:, n] for n, name in enumerate(PROJECTIONS)}
    totals = {name: totals[:, n] for n, name in enumerate(PROJECTIONS)}
    products["pair_bias"], totals["pair_bias"] = bias_kernel[..., :heads], bias_total[..., :heads]
    return dz, _weights_gradients(weights, products, totals, width)


def _weights_gradients(weights, products, totals, width):
    """The gradients of all weights, from sums over pairs for each projection.

    With y = LayerNorm(z) before scale and bias, x = scale y + bias and d the gradient of x W:

    Args:
      products: sum of y^T d, [B, C, columns of W].
      totals: sum of d, [B, columns of W].
    """
    scale, bias = _operands.norms(weights["norm"])
    d_scale, d_bias, gradients = 0.0, 0.0, {}
    for name, product in products.items():
        factor = {"q": math.log2(math.e) / math.sqrt(width), "pair_bias": math.log2(math.e)}
        product, total = (factor.get(name, 1.0) * x for x in (product, totals[name]))
        kernel = weights[name]["kernel"]
        flat = kernel.reshape(kernel.shape[0], -1).astype(jnp.float32)
        # Not matrix products: those follow a precision that is none of these sums' business.
        d_scale += jnp.sum(flat * product, axis=-1)
        d_bias += jnp.sum(flat * total[:, None, :], axis=-1)
        d_kernel = scale[:, None] * product + bias[:, None] * total[:, None, :]
        gradients[name] = {"kernel": d_kernel.reshape(-1, *kernel.shape)}
        if "bias" in weights[name]:
            gradients[name]["bias"] = total.reshape(-1, *weights[name]["bias"].shape)
    return {"norm": {"scale": d_scale, "bias": d_bias}, **gradients}


def output(z: str, attended: str, whole: str):
    """The stage o, z, mask, d_out -> d_o, d_gate, given the axes of each."""
    pair = z.removesuffix(" c")
    return stage(
        "attention_output_backward",
        _output_backward,
        f"{attended}, {z}, {pair}, {z} -> {attended}, {attended}",
        whole=whole,
        kernel=Kernel(_output_kernel, lambda arrays, weights, **_: unsupported(arrays[1], weights)),
    )


def project(z: str, attended: str, bias: str, whole: str):
    """The stage z, mask, dq, dk, dv, d_bias, d_gate, d_out -> dz, given the axes of each."""
    pair = z.removesuffix(" c")
    return stage(
        "attention_project_backward",
        _project_backward,
        f"{z}, {pair}, {attended}, {attended}, {attended}, {bias}, {attended}, {z} -> {z}",
        whole=whole,
        padded=bias[-1],
        kernel=Kernel(
            _project_kernel, lambda arrays, weights, **_: unsupported(arrays[0], weights)
        ),
    )
