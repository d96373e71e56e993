"""Stage 3 of triangle multiplication: layer norm over channels, output projection, gate."""

from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _reference
from genie_tk_jax._stage import stage
from genie_tk_jax.params import checked, triangle_multiplication_spec

GROUPS = ("norm_in", "norm_out", "proj_out", "gate_out")


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


def _backward_reference(arrays, weights, *, residual, epsilon):
    z, t, mask, d_out = arrays
    (dz, dt), d_weights = _reference.pullback(
        partial(reference, residual=residual, epsilon=epsilon), (z, t), (mask,), weights, d_out
    )
    return dz, dt, d_weights


AXES = "b i j c, b h i j, b i j"
forward = stage("gated_output", reference, f"{AXES} -> b i j c", whole="c h", padded="i j")
backward = stage(
    "gated_output_backward",
    _backward_reference,
    f"{AXES}, b i j c -> b i j c, b h i j",
    whole="c h",
    padded="i j",
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
        out = _op(z, t, mask, weights, residual, epsilon, implementation)
    return shapes.unfold(out)
