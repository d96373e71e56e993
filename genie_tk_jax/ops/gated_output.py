"""Stage 3 of triangle multiplication: layer norm over channels, output projection, gate."""

from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage
from genie_tk_jax.params import checked, triangle_multiplication_spec

GROUPS = ("norm_in", "norm_out", "proj_out", "gate_out")
NORM = ("scale", "bias")
WIDTHS = (64, 128, 256)


def reference(arrays, weights, *, residual, epsilon):
    """z [B, I, J, C], t [B, Hm, I.., J..], mask bool [B, I, J] or None -> [B, I, J, C].

    t may be longer than z: what lies past I and J is not read.
    """
    z, t, mask = arrays
    t = t[..., : z.shape[1], : z.shape[2]]
    z = _reference.readable(z, mask)
    x = _reference.layer_norm(z, **weights["norm_in"], epsilon=epsilon)
    gate = jax.nn.sigmoid(_reference.linear("bijc,cd->bijd", x, weights["gate_out"]))
    y = _reference.layer_norm(jnp.moveaxis(t, 1, -1), **weights["norm_out"], epsilon=epsilon)
    update = gate * _reference.linear("bijh,hc->bijc", y.astype(z.dtype), weights["proj_out"])
    return z + update if residual else update


def unsupported(arrays, weights, **_) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    z, t, *_ = arrays
    if why := _operands.unserved_dtype("z", z):
        return why
    expected = jnp.bfloat16 if z.dtype == jnp.bfloat16 else jnp.float32
    if t.dtype != expected:
        return f"t must be {jnp.dtype(expected)} for {z.dtype} z; got {t.dtype}"
    return _operands.unserved_width({"c_z": z.shape[-1], "c_hidden": t.shape[1]}, WIDTHS)


def _parameters(dtype, weights):
    """Weights in the order and the dtypes that the kernels read."""
    norm_in, norm_out, projection, gate = (weights[group] for group in GROUPS)
    return (
        *_operands.norms(norm_in, norm_out),
        *_operands.kernels(dtype, projection, gate),
        *_operands.biases(projection, gate),
    )


def _kernel(arrays, weights, *, residual, epsilon):
    z, t, mask = arrays
    return _ffi.call(
        "genie_gated_output_fwd",
        jax.ShapeDtypeStruct(z.shape, z.dtype),
        *(z, t, mask, *_parameters(z.dtype, weights)),
        residual=residual,
        epsilon=epsilon,
    )


def _backward_reference(arrays, weights, *, residual, epsilon):
    z, t, mask, d_out = arrays
    (dz, dt), d_weights = _reference.pullback(
        partial(reference, residual=residual, epsilon=epsilon), (z, t), (mask,), weights, d_out
    )
    return dz, dt, d_weights


def _backward_unsupported(arrays, weights, **static) -> str | None:
    z, t, *_ = arrays
    if 256 in (z.shape[-1], t.shape[1]):
        return "c_z and c_hidden must be 64 or 128: wider products outgrow a block's registers"
    return unsupported(arrays, weights, **static)


COLUMN_SUMS = 512  # floats beside the products in a block's partial sums


def _backward_kernel(arrays, weights, *, residual, epsilon):
    z, t, mask, d_out = arrays
    (batch, *_, channels), hidden = z.shape, t.shape[1]
    blocks = _operands.parts(z.shape[:3])
    partial_size = (hidden + channels) * channels + COLUMN_SUMS
    shapes = [(channels,)] * 2 + [(hidden,)] * 2 + [(hidden, channels), (channels, channels)]
    shapes += [(channels,)] * 2 + [(blocks, partial_size)]
    gradients = [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes]
    dz, dt, *found, _ = _ffi.call(
        "genie_gated_output_bwd",
        (*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (z, t)), *gradients),
        *(z, t, mask, d_out, *_parameters(z.dtype, weights)),
        residual=residual,
        epsilon=epsilon,
    )
    norm_in, norm_out, kernels, biases = (tuple(found[i : i + 2]) for i in range(0, 8, 2))
    d_weights: list[dict] = [dict(zip(NORM, norm, strict=True)) for norm in (norm_in, norm_out)]
    for group, kernel, bias in zip(GROUPS[2:], kernels, biases, strict=True):
        d_weights.append({"kernel": kernel} | ({"bias": bias} if "bias" in weights[group] else {}))
    return dz, dt, dict(zip(GROUPS, d_weights, strict=True))


AXES = "b i j c, b h i j, b i j"
forward = stage(
    "gated_output",
    reference,
    f"{AXES} -> b i j c",
    whole="c h",
    padded="i j",
    kernel=Kernel(_kernel, unsupported),
)
backward = stage(
    "gated_output_backward",
    _backward_reference,
    f"{AXES}, b i j c -> b i j c, b h i j",
    whole="c h",
    padded="i j",
    kernel=Kernel(_backward_kernel, _backward_unsupported),
)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(z, t, mask, weights, residual, epsilon, implementation):
    static = dict(residual=residual, epsilon=epsilon, implementation=implementation)
    return forward((z, t, mask), weights, **static)


def _op_forward(z, t, mask, weights, residual, epsilon, implementation):
    out = _op(z, t, mask, weights, residual, epsilon, implementation)
    return out, (z, t, mask, weights)


def _op_backward(residual, epsilon, implementation, residuals, d_out):
    z, t, mask, weights = residuals
    static = dict(residual=residual, epsilon=epsilon, implementation=implementation)
    dz, dt, d_weights = backward((z, t, mask, d_out), weights, **static)
    return dz, dt, None, _reference.like(d_weights, weights)


_op.defvjp(_op_forward, _op_backward)


def gated_output(
    t: jax.Array,
    z: jax.Array,
    params: dict,
    residual: bool = False,
    *,
    mask: jax.Array | None = None,
    epsilon: float = 1e-5,
    implementation: _dispatch.Implementation | None = None,
) -> jax.Array:
    """The update of triangle multiplication from its contraction.

    sigmoid(LayerNorm(z) W_gate) * (LayerNorm(t) W_proj), plus z with `residual`.

    Args:
      t: from `contract`, [*, c_hidden, I, J], in z's dtype or float32.
      z: pair representation [*, I, J, c_z], float32, bfloat16 or float16.
      params: "norm_in", "norm_out", "proj_out" and "gate_out" of `init_triangle_multiplication`;
        other groups are not read.
      residual: return z + update.
      mask: [*, I, J]; masked pairs in which z holds inf or NaN read as zeros. Nothing else is
        masked here.
      epsilon: of both layer norms.
      implementation: "cuda", "xla", or None for the kernel wherever it serves.

    Returns:
      [*, I, J, c_z] in z's dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12, lines 3 and 4.
    """
    op = "gated_output"
    shapes = _contract.Shapes(op)
    z, mask = _contract.pair(shapes, z, mask, "... I J c_z")
    shapes.bind("t", t, "... c_hidden I J", "Pass the result of contract.")
    t = _contract.floating(op, "t", t)
    if t.dtype != jnp.float32:
        _contract.same_dtype(op, z=z, t=t)
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)
    spec = triangle_multiplication_spec(shapes["c_z"], shapes["c_hidden"])
    weights = checked(op, params, spec, GROUPS)

    z, t, mask = shapes.fold(z, t, mask)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, (z, t))
        out = reference((z, t, mask), weights, residual=residual, epsilon=epsilon)
    else:
        out = _op(z, _operands.padded(t), mask, weights, residual, epsilon, implementation)
    return shapes.unfold(out)
