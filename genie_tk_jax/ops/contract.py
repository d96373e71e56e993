"""Stage 2 of triangle multiplication: the contraction over the third node of the triangle."""

from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage

DIRECTIONS = ("outgoing", "incoming")

# The operand whose own axis is sharded as the result's should be comes first: the rows of a for
# outgoing, the columns of b for incoming. Where only one of the two can be, the first one is.
AXES = {"outgoing": "b h i k, b h j k", "incoming": "b h k j, b h k i"}


def ordered(x, y, direction):
    return (x, y) if direction == "outgoing" else (y, x)


def reference(arrays, weights, *, direction):
    """a, b (incoming: b, a), channel first, and where they are valid -> t [B, Hm, I, J].

    Masks, bool without the channels or None, only say where a and b are zero. t is float32 for
    float16, which a sum of products overflows.
    """
    left, right, *_ = arrays
    equation = {"outgoing": "bhik,bhjk->bhij", "incoming": "bhkj,bhki->bhij"}[direction]
    dtype = jnp.float32 if left.dtype == jnp.float16 else left.dtype
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _backward_reference(arrays, weights, *, direction):
    left, right, dt, *_ = arrays
    gradients, _ = _reference.pullback(
        partial(reference, direction=direction), (left, right), (), weights, dt
    )
    return gradients


def unsupported(arrays, weights, **_) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    left, right, *_ = arrays
    if why := _operands.unserved_dtype("a and b", left):
        return why
    if 0 in left.shape[2:] or 0 in right.shape[2:]:
        return "a and b must have pairs"
    if left.shape[-1] % _operands.PADDING or right.shape[-1] % _operands.PADDING:
        return "rows must be whole multiples of 16 bytes"
    return None


def _backward_unsupported(arrays, weights, **static) -> str | None:
    if arrays[0].dtype == jnp.float16:
        return "the gradients of float16 multiply it by a float32 dt, which no kernel does"
    return unsupported(arrays, weights, **static)


def _live(*masks):
    """Room for a byte for each block of 64 x 64 pairs of the masks."""
    shapes = [mask.shape for mask in masks if mask is not None]
    size = sum(batch * -(-rows // 64) * -(-columns // 64) for batch, rows, columns in shapes)
    return jax.ShapeDtypeStruct((size,), jnp.uint8)


def _kernel(arrays, weights, *, direction):
    left, right, left_mask, right_mask = arrays
    a, b = ordered(left, right, direction)
    masks = ordered(left_mask, right_mask, direction)
    dtype = jnp.float32 if a.dtype == jnp.float16 else a.dtype
    axis = {"outgoing": 2, "incoming": 3}[direction]
    t = jax.ShapeDtypeStruct((*a.shape[:2], a.shape[axis], b.shape[axis]), dtype)
    t, _ = _ffi.call(
        "genie_contract_fwd",
        (t, _live(*masks)),
        *(a, b, *masks),
        incoming=direction == "incoming",
    )
    return t


def _backward_kernel(arrays, weights, *, direction):
    left, right, dt, left_mask, right_mask = arrays
    a, b = ordered(left, right, direction)
    masks = ordered(left_mask, right_mask, direction)
    da, db, _ = _ffi.call(
        "genie_contract_bwd",
        (*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b)), _live(*masks)),
        *(a, b, dt, *masks),
        incoming=direction == "incoming",
    )
    return ordered(da, db, direction)


def _stages(operands: str):
    result, masks = "b h i j", operands.replace(" h", "")
    axes = dict(whole="k", padded="i j k")
    forward = Kernel(_kernel, unsupported)
    backward = Kernel(_backward_kernel, _backward_unsupported)
    backward_rule = f"{operands}, {result}, {masks} -> {operands}"
    return (
        stage("contract", reference, f"{operands}, {masks} -> {result}", **axes, kernel=forward),
        stage("contract_backward", _backward_reference, backward_rule, **axes, kernel=backward),
    )


STAGES = {direction: _stages(operands) for direction, operands in AXES.items()}

# From so many products on, skipping what is masked outweighs finding it, which takes a launch.
WORTH_A_MASK = 128 * 512**3


def _masks(a, b, mask):
    """The masks of both operands, or none where they would not pay."""
    worth = a.size * max(b.shape[2:]) >= WORTH_A_MASK
    return (mask, mask) if worth else (None, None)


def forward(a, b, mask, *, direction, implementation):
    """t of a and b, [B, Hm, ..] with both pair axes padded; mask bool [B, ..] or None.

    a and b are zero where the mask is False, which the mask only tells the kernel to make use of.
    """
    run, _ = STAGES[direction]
    static = dict(implementation=implementation, direction=direction)
    return run((*ordered(a, b, direction), *_masks(a, b, mask)), {}, **static)


def backward(a, b, dt, mask, *, direction, implementation):
    """da and db; at masked pairs, where a and b are constants, they may hold anything finite."""
    _, run = STAGES[direction]
    static = dict(implementation=implementation, direction=direction)
    first, second = run((*ordered(a, b, direction), dt, *_masks(a, b, mask)), {}, **static)
    return ordered(first, second, direction)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _op(a, b, direction, implementation):
    return forward(a, b, None, direction=direction, implementation=implementation)


def _op_forward(a, b, direction, implementation):
    return _op(a, b, direction, implementation), (a, b)


def _op_backward(direction, implementation, residuals, dt):
    a, b = residuals
    return backward(a, b, dt, None, direction=direction, implementation=implementation)


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
        a, b = _operands.padded(a), _operands.padded(b)
        t = _op(a, b, direction, implementation)[..., : shapes["I"], : shapes["J"]]
    return shapes.unfold(t)
