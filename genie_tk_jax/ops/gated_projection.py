"""Stage 1 of triangle multiplication: layer norm, projections a and b, their gates, the mask."""

from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage
from genie_tk_jax.params import axis_size, checked, triangle_multiplication_spec

GROUPS = ("norm_in", "proj_in", "gate_in")
WIDTHS = (64, 128, 256)


def reference(arrays, weights, *, epsilon):
    """z [B, I, K, C], mask bool [B, I, K] or None -> a, b [B, Hm, I, K], I and K rounded up."""
    z, mask = arrays
    x = _reference.layer_norm(_reference.readable(z, mask), **weights["norm_in"], epsilon=epsilon)
    gate = jax.nn.sigmoid(_reference.linear("bikc,ch->bikh", x, weights["gate_in"]))
    ab = gate * _reference.linear("bikc,ch->bikh", x, weights["proj_in"])
    if mask is not None:
        ab = jnp.where(mask[..., None], ab, 0)
    a, b = jnp.split(_operands.padded(jnp.moveaxis(ab, -1, 1)), 2, axis=1)
    return a, b


def unsupported(arrays, weights, **_) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    z, hidden = arrays[0], weights["proj_in"]["kernel"].shape[1] // 2
    widths = {"c_z": z.shape[-1], "c_hidden": hidden}
    return _operands.unserved_dtype("z", z) or _operands.unserved_width(widths, WIDTHS)


def _parameters(dtype, weights):
    """Weights in the order and the dtypes that the kernels read."""
    norm, *linears = (weights[group] for group in GROUPS)
    return (
        *_operands.norms(norm),
        *_operands.kernels(dtype, *linears),
        *_operands.biases(*linears),
    )


def _kernel(arrays, weights, *, epsilon):
    z, mask = arrays
    hidden = weights["proj_in"]["kernel"].shape[1] // 2
    batch, *sizes, _ = z.shape
    shape = (batch, hidden, *(size + -size % _operands.PADDING for size in sizes))
    result = jax.ShapeDtypeStruct(shape, z.dtype)
    operands = z, mask, *_parameters(z.dtype, weights)
    return _ffi.call("genie_gated_projection_fwd", (result, result), *operands, epsilon=epsilon)


def _backward_reference(arrays, weights, *, epsilon):
    """z, mask, the gradients of a and b, and dz_in or None -> dz_in + dz, gradients of weights."""
    z, mask, da, db, dz_in = arrays
    (dz,), d_weights = _reference.pullback(
        partial(reference, epsilon=epsilon), (z,), (mask,), weights, (da, db)
    )
    return dz if dz_in is None else dz_in + dz, d_weights


def _backward_unsupported(arrays, weights, **static) -> str | None:
    z = arrays[0]
    if z.shape[-1] == 256:
        return (
            "c_z must be 64 or 128: the weights of 256 channels leave no room for their gradients"
        )
    return unsupported(arrays, weights, **static)


def _backward_kernel(arrays, weights, *, epsilon):
    z, mask, da, db, dz_in = arrays
    _, projection, gate = (weights[group] for group in GROUPS)
    batch, *_, channels = z.shape
    width = projection["kernel"].shape[1]
    # A cluster of two blocks shares the pairs of a part, unless one holds all hidden columns.
    parts = _operands.parts(z.shape[:3], _operands.BLOCKS // min(2, width // 128))
    shapes = [(channels,)] * 2 + [(channels, width)] * 2 + [(width,)] * 2
    shapes += [(parts, 2, channels + 1, width)]
    gradients = [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes]
    dz, scale, bias, d_projection, d_gate, *d_biases, _ = _ffi.call(
        "genie_gated_projection_bwd",
        (jax.ShapeDtypeStruct(z.shape, z.dtype), *gradients),
        z,
        mask,
        da,
        db,
        dz_in,
        *_parameters(z.dtype, weights),
        aliases=None if dz_in is None else {4: 0},
        epsilon=epsilon,
    )
    d_linears = (
        {"kernel": kernel, **({"bias": d_bias} if "bias" in linear else {})}
        for kernel, d_bias, linear in zip(
            (d_projection, d_gate), d_biases, (projection, gate), strict=True
        )
    )
    return dz, dict(zip(GROUPS, ({"scale": scale, "bias": bias}, *d_linears), strict=True))


AXES = "b i k c, b i k"
forward = stage(
    "gated_projection",
    reference,
    f"{AXES} -> b h i k, b h i k",
    whole="c h",
    padded="i k",
    kernel=Kernel(_kernel, unsupported),
)
backward = stage(
    "gated_projection_backward",
    _backward_reference,
    f"{AXES}, b h i k, b h i k, b i k c -> b i k c",
    whole="c h",
    padded="i k",
    kernel=Kernel(_backward_kernel, _backward_unsupported),
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _op(z, mask, weights, epsilon, implementation):
    return forward((z, mask), weights, implementation=implementation, epsilon=epsilon)


def _op_forward(z, mask, weights, epsilon, implementation):
    return _op(z, mask, weights, epsilon, implementation), (z, mask, weights)


def _op_backward(epsilon, implementation, residuals, cotangents):
    z, mask, weights = residuals
    dz, d_weights = backward(
        (z, mask, *cotangents, None), weights, implementation=implementation, epsilon=epsilon
    )
    return dz, None, _reference.like(d_weights, weights)


_op.defvjp(_op_forward, _op_backward)


def gated_projection(
    z: jax.Array,
    mask: jax.Array | None,
    params: dict,
    *,
    epsilon: float = 1e-5,
    implementation: _dispatch.Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """The operands of triangle multiplication's contraction, channel first.

    x = LayerNorm(z); a | b = mask * sigmoid(x W_gate) * (x W_proj), halves of one projection.

    Args:
      z: pair representation [*, I, K, c_z], float32, bfloat16 or float16; need not be square.
      mask: [*, I, K], bool or 0/1 of any dtype, or None for all valid. Masked pairs give zero,
        whatever z holds there.
      params: "norm_in", "proj_in" and "gate_in" of `init_triangle_multiplication`; other groups
        are not read.
      epsilon: of the layer norm.
      implementation: "cuda", "xla", or None for the kernel wherever it serves.

    Returns:
      a, b [*, c_hidden, I, K] in z's dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12, lines 1 and 2.
    """
    op = "gated_projection"
    shapes = _contract.Shapes(op)
    z, mask = _contract.pair(shapes, z, mask, "... I K c_z")
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)
    spec = triangle_multiplication_spec(
        shapes["c_z"], axis_size(params, "proj_in", "kernel", 1) // 2
    )
    weights = checked(op, params, spec, GROUPS)

    z, mask = shapes.fold(z, mask)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, (z, mask))
        a, b = reference((z, mask), weights, epsilon=epsilon)
    else:
        a, b = _op(z, mask, weights, epsilon, implementation)
    rows, columns = shapes["I"], shapes["K"]
    return tuple(shapes.unfold(x[..., :rows, :columns]) for x in (a, b))
