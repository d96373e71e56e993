"""Stage 2 of triangle multiplication: the contraction over the third node of the triangle."""

from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _reference
from genie_tk_jax._stage import stage

DIRECTIONS = ("outgoing", "incoming")

# The operand whose own axis is sharded as the result's should be comes first: the rows of a for
# outgoing, the columns of b for incoming. Where only one of the two can be, the first one is.
AXES = {"outgoing": "b h i k, b h j k", "incoming": "b h k j, b h k i"}


def ordered(x, y, direction):
    return (x, y) if direction == "outgoing" else (y, x)


def reference(arrays, weights, *, direction):
    """a, b (incoming: b, a), channel first -> t [B, Hm, I, J].

    t is float32 for float16, which a sum of products overflows.
    """
    left, right = arrays
    equation = {"outgoing": "bhik,bhjk->bhij", "incoming": "bhkj,bhki->bhij"}[direction]
    dtype = jnp.float32 if left.dtype == jnp.float16 else left.dtype
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _backward_reference(arrays, weights, *, direction):
    *operands, dt = arrays
    gradients, _ = _reference.pullback(
        partial(reference, direction=direction), tuple(operands), (), weights, dt
    )
    return gradients


def _stages(operands: str):
    result = "b h i j"
    backward_axes = f"{operands}, {result} -> {operands}"
    return (
        stage("contract", reference, f"{operands} -> {result}", whole="k"),
        stage("contract_backward", _backward_reference, backward_axes, whole="k"),
    )


STAGES = {direction: _stages(operands) for direction, operands in AXES.items()}


def forward(a, b, *, direction, implementation):
    """t of a and b."""
    run, _ = STAGES[direction]
    static = dict(implementation=implementation, direction=direction)
    return run(ordered(a, b, direction), {}, **static)


def backward(a, b, dt, *, direction, implementation):
    """da and db."""
    _, run = STAGES[direction]
    static = dict(implementation=implementation, direction=direction)
    first, second = run((*ordered(a, b, direction), dt), {}, **static)
    return ordered(first, second, direction)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _op(a, b, direction, implementation):
    return forward(a, b, direction=direction, implementation=implementation)


def _op_forward(a, b, direction, implementation):
    return _op(a, b, direction, implementation), (a, b)


def _op_backward(direction, implementation, residuals, dt):
    a, b = residuals
    return backward(a, b, dt, direction=direction, implementation=implementation)


_op.defvjp(_op_forward, _op_backward)


def contract(
    a: jax.Array,
    b: jax.Array,
    direction: str,
    *,
    implementation: _dispatch.Implementation | None = None,
) -> jax.Array:
    """The sum over the third node of the triangle, one matrix product a channel.

    outgoing: t[h, i, j] = sum_k a[h, i, k] b[h, j, k]
    incoming: t[h, i, j] = sum_k a[h, k, i] b[h, k, j]

    Args:
      a, b: from `gated_projection`, float32, bfloat16 or float16. outgoing: [*, c_hidden, I, K]
        and [*, c_hidden, J, K]; incoming: [*, c_hidden, K, I] and [*, c_hidden, K, J].
      direction: "outgoing" or "incoming".
      implementation: "cuda", "xla", or None for the kernel wherever it serves.

    Returns:
      t [*, c_hidden, I, J], accumulated in float32; in the dtype of a, but float32 for float16,
      in which the sum may overflow.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithm 11, line 4, and Algorithm 12, line 4.
    """
    op = "contract"
    _contract.one_of(op, "direction", direction, DIRECTIONS)
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)
    shapes = _contract.Shapes(op)
    axes = {"outgoing": ("I K", "J K"), "incoming": ("K I", "K J")}[direction]
    cure = f"direction={direction!r} contracts K of both; pass a and b of gated_projection."
    for name, array, own in zip("ab", (a, b), axes, strict=True):
        shapes.bind(name, array, f"... c_hidden {own}", cure)
    a, b = _contract.floating(op, "a", a), _contract.floating(op, "b", b)
    _contract.same_dtype(op, a=a, b=b)

    a, b = shapes.fold(a, b)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, (a, b))
        t = reference(ordered(a, b, direction), {}, direction=direction)
    else:
        t = _op(a, b, direction, implementation)
    return shapes.unfold(t)
