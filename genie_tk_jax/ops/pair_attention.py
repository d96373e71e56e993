"""The core of triangle attention: attention along every row of a pair, one bias for all rows."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _ffi, _operands, _reference
from genie_tk_jax._stage import Kernel, stage


def softmax_of_row(q, k, v, bias, mask, *, folded=False):
    """q [B, Q, H, D], k, v [B, K, H, D], bias [B, H, Q, K], mask [B, K] -> o like q, lse [B, H, Q].

    Bias, in nats, and mask may be None. A row without a valid key gives zeros, with lse -inf. If
    `folded`, q carries log2(e) / sqrt(D).
    """
    dtype = _reference.statistics_dtype(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)
    logits = logits * math.log(2) if folded else logits / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias.astype(dtype)
    lowest = jnp.finfo(dtype).min
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, lowest)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=lowest))
    weights = jnp.exp(logits - peak)
    if mask is not None:
        weights = jnp.where(mask[:, None, None, :], weights, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total == 0, 1, total)
    o = jnp.einsum("bhqk,bkhd->bqhd", (weights / safe).astype(v.dtype), v)
    lse = jnp.where(total == 0, -jnp.inf, peak + jnp.log(safe))
    return o, lse[..., 0]


def reference(arrays, weights, *, with_lse, folded=False):
    """q [B, I, Q, H, D], k, v [B, I, K, H, D], bias [B, H, Q, K], mask [B, I, K] -> o, lse.

    lse is float32 [B, I, H, Q], in nats; without `with_lse` the result is o alone. The bias may
    have columns beyond K, which are not read. If `folded`, q carries log2(e) / sqrt(D) and the
    bias log2(e), so that q . k + bias is the logit in base 2.
    """
    q, k, v, bias, mask = arrays
    batch, _, queries, heads, _ = q.shape
    if bias is not None:
        # In float32 while it is shared: the gradients of its many rows sum in its dtype.
        bias = bias[..., : k.shape[2]].astype(_reference.statistics_dtype(bias.dtype))
        bias = bias * math.log(2) if folded else bias
    o, lse = _reference.over_rows(
        lambda q, k, v, mask: softmax_of_row(q, k, v, bias, mask, folded=folded),
        batch * heads * queries * k.shape[2],
        (q, k, v, mask),
    )
    return (o, lse) if with_lse else o


def _backward_reference(arrays, weights, *, folded=False):
    """The operands of the forward, o, lse and do -> dq, dk, dv, dbias (float32)."""
    q, k, v, bias, mask, _, _, d_o = arrays
    bias = None if bias is None else bias.astype(_reference.statistics_dtype(bias.dtype))
    differentiated = (q, k, v) if bias is None else (q, k, v, bias)

    def function(operands, weights):
        operands = operands if bias is not None else (*operands[:3], None, operands[3])
        return reference(operands, weights, with_lse=False, folded=folded)

    gradients, _ = _reference.pullback(
        function, differentiated, (mask,), weights, d_o, in_turn=True
    )
    return gradients


HEAD_CHANNELS = (16, 32, 64)
_MOST = 2**30  # of any size


def _unsupported(arrays, weights, *, with_lse, folded=False) -> str | None:
    """Why the forward kernel cannot serve these operands, or None."""
    q, k, _, bias, _ = arrays
    channels = q.shape[-1]
    if why := _operands.unserved_dtype("q, k and v", q):
        return why
    if bias is not None and bias.dtype != q.dtype:
        return f"bias must be {q.dtype} as q is; got {bias.dtype}"
    if channels not in HEAD_CHANNELS:
        return f"heads must have one of {HEAD_CHANNELS} channels; got {channels}"
    if not 0 < k.shape[2] < _MOST or q.size >= _MOST * channels:
        return f"there must be at least one key and less than 2**30; got {k.shape[2]}"
    return None


def _call(arrays, weights, *, with_lse, folded=False):
    q, k, v, bias, mask = arrays
    batch, rows, queries, heads, _ = q.shape
    if bias is not None:
        bias = _operands.padded(bias, 1)
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, rows, heads, queries if with_lse else 0), jnp.float32),
    )
    o, lse = _ffi.call("genie_pair_attention_fwd", results, q, k, v, bias, mask, folded=folded)
    return (o, lse) if with_lse else o


def _backward_unsupported(arrays, weights, *, folded=False) -> str | None:
    """Why the backward kernels cannot serve these operands, or None."""
    if arrays[0].size == 0:
        return f"there must be at least one query; got q {list(arrays[0].shape)}"
    return _unsupported(arrays[:5], weights, with_lse=True, folded=folded)


_TILE = 128  # queries or keys of a block of the kernel that makes dbias
_PROCESSORS = 132  # of an H100 or H200; on others the sums are as right and the waves less whole
_MOST_CHUNKS = 16


def _chunks(rows: int, tiles: int) -> int:
    """In how many chunks of rows dbias is summed, so that all tiles of them make whole waves.

    A chunk costs the memory of one dbias, so a few per cent of a wave are not worth another.
    """

    def cost(chunks):
        return math.ceil(tiles * chunks / _PROCESSORS) / chunks + 0.02 * chunks

    return min(range(1, min(rows, _MOST_CHUNKS) + 1), key=cost)


def _query_words(queries: int, dtype) -> int:
    """Floats that the backward keeps of a row i and head: lse, delta and, in float16, scales."""
    padded = queries + -queries % 64
    return 2 * padded + (padded // 16 if dtype == jnp.float16 else 0)


def _backward_call(arrays, weights, *, folded=False):
    q, k, v, bias, mask, o, lse, d_o = arrays
    batch, rows, queries, heads, _ = q.shape
    keys = k.shape[2]
    like_bias, chunks = (0,), 1
    if bias is not None:
        bias = _operands.padded(bias, 1)
        like_bias = bias.shape
        tiles = math.ceil(queries / _TILE) * math.ceil(keys / _TILE) * batch * heads
        chunks = _chunks(rows, tiles)
    shapes = [(x.shape, x.dtype) for x in (q, k, v)]
    shapes += [
        (like_bias, jnp.float32),
        ((batch, rows, heads, _query_words(queries, q.dtype)), jnp.float32),
        ((chunks, *like_bias) if chunks > 1 else (1, 0, 0, 0, 0), jnp.float32),
    ]
    results = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    gradients = _ffi.call(
        "genie_pair_attention_bwd", results, q, k, v, bias, mask, o, lse, d_o, folded=folded
    )[:4]
    if bias is None:
        return tuple(gradients[:3])
    return *gradients[:3], gradients[3][..., : arrays[3].shape[-1]]


QUERY, KEY, BIAS, MASK, LSE = "b i q h d", "b i k h d", "b h q p", "b i k", "b i h q"
OPERANDS = f"{QUERY}, {KEY}, {KEY}, {BIAS}, {MASK}"


def _forward_stage(results: str):
    return stage(
        "attend",
        reference,
        f"{OPERANDS} -> {results}",
        whole="k d p",
        fold="i",
        kernel=Kernel(_call, _unsupported),
    )


_forward = {True: _forward_stage(f"{QUERY}, {LSE}"), False: _forward_stage(QUERY)}


def _backward_stage(results: str):
    return stage(
        "attend_backward",
        _backward_reference,
        f"{OPERANDS}, {QUERY}, {LSE}, {QUERY} -> {results}",
        whole="k d p",
        kernel=Kernel(_backward_call, _backward_unsupported),
    )


_backward = {
    True: _backward_stage(f"{QUERY}, {KEY}, {KEY}, {BIAS}"),
    False: _backward_stage(f"{QUERY}, {KEY}, {KEY}"),
}


def forward(operands, *, with_lse, implementation, folded=False):
    """o, and lse when it is wanted, of operands (q, k, v, bias, mask); see `reference`."""
    return _forward[with_lse](
        operands, {}, implementation=implementation, with_lse=with_lse, folded=folded
    )


def backward(operands, o, lse, d_o, *, implementation, folded=False):
    """dq, dk, dv and, when there is a bias, dbias in float32."""
    with_bias = operands[3] is not None
    return _backward[with_bias](
        (*operands, o, lse, d_o), {}, implementation=implementation, folded=folded
    )


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _op(q, k, v, bias, mask, implementation):
    return forward((q, k, v, bias, mask), with_lse=False, implementation=implementation)


def _op_forward(q, k, v, bias, mask, implementation):
    operands = (q, k, v, bias, mask)
    o, lse = forward(operands, with_lse=True, implementation=implementation)
    return o, (operands, o, lse)


def _op_backward(implementation, residuals, d_o):
    operands, o, lse = residuals
    dq, dk, dv, *d_bias = backward(operands, o, lse, d_o, implementation=implementation)
    d_bias = d_bias[0].astype(operands[3].dtype) if d_bias else None
    return dq, dk, dv, d_bias, None


_op.defvjp(_op_forward, _op_backward)


def pair_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    implementation: _dispatch.Implementation | None = None,
) -> jax.Array:
    """Attention along every row i of a pair representation, with one bias for all rows.

    out[i, q] = sum_k softmax_k(q[i, q] . k[i, k] / sqrt(D) + bias[q, k]) v[i, k], a head at a time.

    Logits and bias are in nats; logits, softmax and sums run in float32. A row with no valid key
    gives zeros, and zero gradients. Memory is O(rows * queries), forward and backward.

    Args:
      q: [*, I, Q, H, D], float32, bfloat16 or float16, finite.
      k, v: [*, I, K, H, D], in q's dtype, finite.
      bias: [*, H, Q, K], any of these dtypes, finite; or None.
      mask: [*, I, K], bool or 0/1 of any dtype, False where key k of row i takes no part; or None.
      implementation: "cuda", "xla", or None for the kernel wherever it serves.

    Returns:
      [*, I, Q, H, D] in q's dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithm 13, lines 5 and 6 (gate left to the caller).
    """
    op = "pair_attention"
    shapes = _contract.Shapes(op)
    cure = "Heads and channels are the last two axes: no axis is moved for you."
    named = {"q": (q, "... I Q H D"), "k": (k, "... I K H D"), "v": (v, "... I K H D")}
    for name, (array, pattern) in named.items():
        shapes.bind(name, array, pattern, cure)
    q, k, v = (_contract.floating(op, name, array) for name, (array, _) in named.items())
    _contract.same_dtype(op, q=q, k=k, v=v)
    if bias is not None:
        shapes.bind("bias", bias, "... H Q K", "The bias is shared by all rows I.")
        bias = _contract.floating(op, "bias", bias)
    if mask is not None:
        shapes.bind("mask", mask, "... I K", "The mask is that of the keys of each row.")
    mask = _contract.truth(op, mask)
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)

    operands = shapes.fold(q, k, v, bias, mask)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, operands)
        out = reference(operands, {}, with_lse=False)
    else:
        out = _op(*operands, implementation)
    return shapes.unfold(out)
