"""The triangle functions of cuequivariance_jax 0.13, by genie_tk_jax's layers.

    from genie_tk_jax.compat.cuequivariance import triangle_attention

Same signatures, layouts and results. What differs: a query none of whose keys is valid gets zeros
from `triangle_attention`, not the mean of v; missing weights are not drawn at random.
"""

import enum
import math
from typing import Any

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _reference, convert
from genie_tk_jax.compat import precision as precisions
from genie_tk_jax.ops import pair_attention
from genie_tk_jax.ops.contract import DIRECTIONS
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication

# What cuequivariance_jax puts in place of a masked logit.
MASKED = -1e9


class TriMulPrecision(enum.IntEnum):
    """cuequivariance_jax's settings, with its values."""

    DEFAULT = 0
    TF32 = 1
    TF32x3 = 2
    IEEE = 3


_MATMUL_PRECISIONS = {
    TriMulPrecision.DEFAULT: "default",
    TriMulPrecision.TF32: "tensorfloat32",
    TriMulPrecision.TF32x3: "TF32_TF32_F32_X3",
    TriMulPrecision.IEEE: "highest",
}


def triangle_multiplicative_update(
    x: jax.Array,
    direction: str = "outgoing",
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
    norm_in_weight: jax.Array | None = None,
    norm_in_bias: jax.Array | None = None,
    p_in_weight: jax.Array | None = None,
    p_in_bias: jax.Array | None = None,
    g_in_weight: jax.Array | None = None,
    g_in_bias: jax.Array | None = None,
    norm_out_weight: jax.Array | None = None,
    norm_out_bias: jax.Array | None = None,
    p_out_weight: jax.Array | None = None,
    p_out_bias: jax.Array | None = None,
    g_out_weight: jax.Array | None = None,
    g_out_bias: jax.Array | None = None,
    eps: float = 1e-5,
    precision: TriMulPrecision | int = TriMulPrecision.DEFAULT,
    fallback: bool | None = None,
) -> jax.Array:
    """Triangle multiplication, Algorithms 11 and 12, with cuequivariance_jax's arguments.

    Args:
      x: [*, N, N, C].
      direction: "outgoing" or "incoming".
      key: not used, for nothing is drawn: all p_ and g_ weights must be given.
      mask: broadcasts to [*, N, N]; valid where it is not 0.
      norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias: [C]; None is ones and zeros.
      p_in_weight, g_in_weight: [2 C, C], [out, in], the halves a | b; their biases [2 C] or None.
      p_out_weight, g_out_weight: [C, C], [out, in]; their biases [C] or None.
      eps: of both layer norms.
      precision: at most what jax_default_matmul_precision gives; float32 only.
      fallback: None for the kernel wherever it serves, True for plain JAX, False for the kernel or
        an error that says why not.

    Returns:
      [*, N, N, C] in x's dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; says which. An output width other than C is
        none that a layer can have.
      NotImplementedError: precision or fallback cannot be honoured; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12.
    """
    op = "triangle_multiplicative_update"
    _contract.one_of(op, "direction", direction, DIRECTIONS)
    _contract.one_of(op, "precision", precision, tuple(TriMulPrecision))
    x = _contract.floating(op, "x", x)
    precisions.check(op, _MATMUL_PRECISIONS[TriMulPrecision(precision)], x.dtype)
    ones, zeros = jnp.ones(x.shape[-1:]), jnp.zeros(x.shape[-1:])
    weights = {
        "norm_in_weight": ones if norm_in_weight is None else norm_in_weight,
        "norm_in_bias": zeros if norm_in_bias is None else norm_in_bias,
        "p_in_weight": p_in_weight,
        "p_in_bias": p_in_bias,
        "g_in_weight": g_in_weight,
        "g_in_bias": g_in_bias,
        "norm_out_weight": ones if norm_out_weight is None else norm_out_weight,
        "norm_out_bias": zeros if norm_out_bias is None else norm_out_bias,
        "p_out_weight": p_out_weight,
        "p_out_bias": p_out_bias,
        "g_out_weight": g_out_weight,
        "g_out_bias": g_out_bias,
    }
    valid = _contract.truth(op, mask)
    return triangle_multiplication(
        x,
        None if valid is None else jnp.broadcast_to(valid, x.shape[:-1]),
        _canonical(op, weights, direction),
        direction=direction,
        epsilon=eps,
        implementation={None: None, True: "xla", False: "cuda"}[fallback],
    )


def _canonical(op: str, weights: dict[str, Any], direction: str) -> dict:
    for name, weight in weights.items():
        if weight is None and name.endswith("weight"):
            raise ValueError(
                f"{op}: {name} must be given; got None, for which no random weights are drawn "
                "here. Draw it, for example with jax.nn.initializers.lecun_normal(in_axis=-1, "
                "out_axis=-2)."
            )
    given = {name: weight for name, weight in weights.items() if weight is not None}
    return convert.to_canonical(given, "cuequivariance", f"triangle_multiplication_{direction}")


def triangle_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None,
    scale: float,
    precision: jax.lax.Precision | None = None,
) -> list[jax.Array]:
    """The core of triangle attention with cuequivariance_jax's arguments and results.

    out = sum_k softmax_k(scale q . k + bias) v, with float32 logits, softmax and sums.

    Under jit, results that are not used cost nothing. Without it the maximum takes one more pass
    over the logits. lse and the maximum have no gradient, as in cuequivariance_jax.

    Args:
      q: [B, N, H, Q, D], float32, bfloat16 or float16.
      k, v: [B, N, H, K, D], in q's dtype.
      bias: [B, 1, H, Q, K].
      mask: [B, N, 1, 1, K], False where a key takes no part; or None.
      scale: a Python number. One other than D^-1/2 is multiplied into q, which is rounded once more
        where scale sqrt(D) is no power of two.
      precision: at most what jax_default_matmul_precision gives; float32 only.

    Returns:
      [out, lse, max]: out [B, N, H, Q, D] in q's dtype, zeros for a query without a valid key; and
      float32 [B, N, H, Q, 1], as the plain JAX path of cuequivariance_jax 0.13 has them: max is the
      largest logit, masked ones counting as -1e9, and lse, in nats, the log of the sum of
      exp(logit - max). The log-sum-exp of the logits themselves is lse + max.

    Raises:
      ValueError, TypeError: an argument does not fit; says which.
      NotImplementedError: precision cannot be honoured; says why.

    Source: Jumper et al. 2021, supplementary Algorithm 13, lines 5 and 6 (gate left to the caller).
    """
    op = "triangle_attention"
    _check_shapes(op, q, k, v, bias, mask)
    q, k, v = (_contract.floating(op, n, x) for n, x in (("q", q), ("k", k), ("v", v)))
    _contract.same_dtype(op, q=q, k=k, v=v)
    bias = _contract.floating(op, "bias", bias)
    precisions.check(op, precision, q.dtype)
    rows = _contract.truth(op, mask)
    rows = None if rows is None else rows[:, :, 0, 0]
    q, k, v = (jnp.swapaxes(x, 2, 3) for x in (_scaled(op, q, scale), k, v))
    bias = bias[:, 0]
    out, lse = _attend(q, k, v, bias, rows)
    peak = _peak(*jax.lax.stop_gradient((q, k, bias)), rows)
    # Where no key is valid all K logits are alike.
    lse = jnp.where(jnp.isneginf(lse), jnp.log(float(k.shape[2])), lse - peak)
    return [jnp.swapaxes(out, 2, 3), lse[..., None], peak[..., None]]


def _check_shapes(op: str, q: Any, k: Any, v: Any, bias: Any, mask: Any) -> None:
    for name, array in {"q": q, "k": k, "v": v, "bias": bias}.items():
        if not hasattr(array, "shape") or len(array.shape) != 5:
            got = getattr(array, "shape", type(array).__name__)
            raise ValueError(f"{op}: {name} must be an array of five axes; got {got}.")
    b, n, h, queries, d = q.shape
    keys = k.shape[3]
    wanted = {
        "k": (k, "B, N, H, K, D", (b, n, h, keys, d)),
        "v": (v, "B, N, H, K, D", (b, n, h, keys, d)),
        "bias": (bias, "B, 1, H, Q, K", (b, 1, h, queries, keys)),
        "mask": (mask, "B, N, 1, 1, K", (b, n, 1, 1, keys)),
    }
    for name, (array, axes, shape) in wanted.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(
                f"{op}: {name} must be [{axes}] = {shape}, to go with q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}; got {tuple(array.shape)}."
            )


def _scaled(op: str, q: jax.Array, scale: float) -> jax.Array:
    """q such that the core, which divides the logits by sqrt(D), scales them by `scale`."""
    try:
        factor = float(scale) * math.sqrt(q.shape[-1])
    except TypeError as error:
        raise TypeError(
            f"{op}: scale must be a Python number, known when tracing; got "
            f"{type(scale).__name__}. Multiply a traced scale into q."
        ) from error
    if math.isclose(factor, 1.0, rel_tol=1e-7):
        return q
    return (q.astype(_reference.statistics_dtype(q.dtype)) * factor).astype(q.dtype)


@jax.custom_vjp
def _attend(q, k, v, bias, mask):
    operands = (q, k, v, bias, mask)
    return pair_attention.forward(operands, with_lse=True, implementation=None)


def _attend_forward(q, k, v, bias, mask):
    out, lse = _attend(q, k, v, bias, mask)
    return (out, lse), ((q, k, v, bias, mask), out, lse)


def _attend_backward(residuals, cotangents):
    operands, out, lse = residuals
    dq, dk, dv, d_bias = pair_attention.backward(
        operands, out, lse, cotangents[0], implementation=None
    )
    return dq, dk, dv, d_bias.astype(operands[3].dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _peak(q, k, bias, mask):
    """The largest logit of each query, float32 [B, N, H, Q], a chunk of rows at a time."""
    batch, _, queries, heads, width = q.shape
    dtype = _reference.statistics_dtype(q.dtype)

    def of_row(q, k, mask):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)
        logits = logits / math.sqrt(width) + bias.astype(dtype)
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, MASKED)
        return jnp.max(logits, axis=-1, initial=-jnp.inf)

    return _reference.over_rows(of_row, batch * heads * queries * k.shape[2], (q, k, mask))
