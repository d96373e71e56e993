"""Triangle multiplication, outgoing and incoming: project, contract, output."""

from functools import partial

import jax

from genie_tk_jax import _contract, _dispatch, _reference
from genie_tk_jax.ops import contract, gated_output, gated_projection
from genie_tk_jax.params import axis_size, checked, triangle_multiplication_spec


def _pick(weights, groups):
    return {group: weights[group] for group in groups}


def reference(z, mask, weights, *, direction, residual, epsilon):
    """The layer on z [B, N, N, C] and mask bool [B, N, N] or None, in plain JAX."""
    projected = _pick(weights, gated_projection.GROUPS)
    a, b = gated_projection.reference((z, mask), projected, epsilon=epsilon)
    t = contract.reference(contract.ordered(a, b, direction), {}, direction=direction)
    arrays, output = (z, t, mask), _pick(weights, gated_output.GROUPS)
    return gated_output.reference(arrays, output, residual=residual, epsilon=epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _op(z, mask, weights, direction, residual, epsilon, implementation):
    static = (direction, residual, epsilon, implementation)
    return _op_forward(z, mask, weights, *static)[0]


def _op_forward(z, mask, weights, direction, residual, epsilon, implementation):
    a, b = _project(z, mask, weights, epsilon, implementation)
    t = contract.forward(a, b, mask, direction=direction, implementation=implementation)
    out = gated_output.forward(
        (z, t, mask),
        _pick(weights, gated_output.GROUPS),
        residual=residual,
        epsilon=epsilon,
        implementation=implementation,
    )
    return out, (z, mask, weights, t)


def _project(z, mask, weights, epsilon, implementation):
    weights = _pick(weights, gated_projection.GROUPS)
    return gated_projection.forward(
        (z, mask), weights, epsilon=epsilon, implementation=implementation
    )


def _op_backward(direction, residual, epsilon, implementation, residuals, d_out):
    z, mask, weights, t = residuals
    dz_output, dt, d_output = gated_output.backward(
        (z, t, mask, d_out),
        _pick(weights, gated_output.GROUPS),
        residual=residual,
        epsilon=epsilon,
        implementation=implementation,
    )
    # a and b are twice the size of z: cheaper to make again than to keep.
    a, b = _project(z, mask, weights, epsilon, implementation)
    da, db = contract.backward(a, b, dt, mask, direction=direction, implementation=implementation)
    dz, d_projection = gated_projection.backward(
        (z, mask, da, db, dz_output),
        _pick(weights, gated_projection.GROUPS),
        epsilon=epsilon,
        implementation=implementation,
    )
    # Both stages read the input norm; its gradient is the sum of theirs.
    d_norm = jax.tree.map(jax.numpy.add, d_output["norm_in"], d_projection["norm_in"])
    d_weights = {**d_output, **d_projection, "norm_in": d_norm}
    return dz, None, _reference.like(d_weights, weights)


_op.defvjp(_op_forward, _op_backward)


def triangle_multiplication(
    z: jax.Array,
    mask: jax.Array | None,
    params: dict,
    *,
    direction: str,
    residual: bool = False,
    epsilon: float = 1e-5,
    implementation: _dispatch.Implementation | None = None,
) -> jax.Array:
    """Updates each pair (i, j) from the other two sides of its triangles (i, j, k).

    x = LayerNorm(z)
    a | b = mask * sigmoid(x W_gate_in) * (x W_proj_in)
    outgoing: t_ij = sum_k a_ik b_jk        incoming: t_ij = sum_k a_ki b_kj
    update = sigmoid(x W_gate_out) * (LayerNorm(t) W_proj_out)

    Args:
      z: pair representation [*, N, N, c_z], float32, bfloat16 or float16, of any batch shape.
      mask: [*, N, N], bool or 0/1 of any dtype, or None for all valid. A masked pair is no term of
        any sum; as an output position it counts as any other.
      params: `init_triangle_multiplication` makes them; biases may be absent.
      direction: "outgoing" (Algorithm 11) or "incoming" (Algorithm 12).
      residual: return z + update.
      epsilon: of both layer norms.
      implementation: "cuda", "xla", or None for kernels wherever they serve. "xla" is plain JAX:
        forward mode and second derivatives work there.

    Returns:
      The update, [*, N, N, c_z] in z's dtype. Statistics and sums are float32; float32 matrix
      products follow `jax_default_matmul_precision`.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12.
    """
    op = "triangle_multiplication"
    shapes = _contract.Shapes(op)
    z, mask = _contract.pair(shapes, z, mask, "... N N c_z")
    _contract.one_of(op, "direction", direction, contract.DIRECTIONS)
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)
    spec = triangle_multiplication_spec(shapes["c_z"], axis_size(params, "norm_out", "scale", 0))
    weights = checked(op, params, spec)

    z, mask = shapes.fold(z, mask)
    static = dict(direction=direction, residual=residual, epsilon=epsilon)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, (z, mask))
        out = reference(z, mask, weights, **static)
    else:
        out = _op(z, mask, weights, *static.values(), implementation)
    return shapes.unfold(out)
