"""Triangle attention around the starting and the ending node: project, attend, output."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _reference
from genie_tk_jax._stage import stage
from genie_tk_jax.ops import attention_backward, attention_stages, pair_attention
from genie_tk_jax.ops.attention_stages import bias_of_pairs, oriented
from genie_tk_jax.params import axis_size, checked, triangle_attention_spec

NODES = ("starting", "ending")
ENDING_BIASES = ("swapped", "unswapped")
ROWS_GROUPS = ("norm", "q", "k", "v", "gate", "out")
BIAS_GROUPS = ("norm", "pair_bias")


def _pick(weights, groups):
    return {group: weights[group] for group in groups}


def _rows(arrays, weights, *, node, residual, epsilon):
    """z [B, N, N, C], bias [B, H, Q, Kp], mask -> [B, N, N, C]: the layer once the bias is made."""
    z, bias, mask = arrays
    # What chunks share is float32, in which the gradients of many chunks sum.
    weights = _reference.wide(weights)
    z, mask = oriented(z, node), oriented(mask, node)
    bias = bias[..., : bias.shape[2]].astype(_reference.statistics_dtype(bias.dtype)) * math.log(2)

    def row(z, mask):
        z, x = attention_stages.normed(z, mask, weights, epsilon)
        q, k, v = attention_stages.queries_keys_values(x, weights)
        o, _ = pair_attention.softmax_of_row(q, k, v, bias, mask, folded=True)
        return attention_stages.gated(o, z, x, weights, residual)

    return oriented(_reference.over_rows(row, math.prod(bias.shape), (z, mask)), node)


def reference(z, mask, weights, *, node, ending_bias, residual, epsilon):
    """The layer on z [B, N, N, C] and mask bool [B, N, N] or None, in plain JAX.

    Rows go from layer norm to output in chunks, so that nothing but the bias spans more rows.
    """
    bias = bias_of_pairs((z, mask), weights, node=node, ending_bias=ending_bias, epsilon=epsilon)
    return _rows((z, bias, mask), weights, node=node, residual=residual, epsilon=epsilon)


def _rows_backward(arrays, weights, **static):
    """z, bias, mask, o, lse, d_out -> dz and dbias (float32) of `_rows`, and its weights'."""
    z, bias, mask, _, _, d_out = arrays
    bias = bias.astype(_reference.statistics_dtype(bias.dtype))
    function = partial(_rows, **static)
    gradients, d_weights = _reference.pullback(
        function, (z, bias), (mask,), weights, d_out, in_turn=True
    )
    return *gradients, d_weights


def _bias_backward(arrays, weights, **static):
    """z, mask, dbias -> dz and the weights' gradients of `bias_of_pairs`."""
    z, mask, d_bias = arrays
    function = partial(bias_of_pairs, **static)
    (dz,), d_weights = _reference.pullback(
        function, (z,), (mask,), weights, d_bias.astype(z.dtype), in_turn=True
    )
    return dz, d_weights


class _Stages(NamedTuple):
    project: Callable
    output: Callable
    output_backward: Callable
    project_backward: Callable
    rows_backward: Callable
    bias_backward: Callable


def _stages(node: str, ending_bias: str) -> _Stages:
    # i counts the rows of attention and j the positions along them, so for the ending node z, in
    # its own order, is [b, j, i, c]. In the projection the bias follows the axes of z that it is
    # made from; for the rows it is one operand that all share, [q, k].
    pair = "b i j" if node == "starting" else "b j i"
    made = "b h j i" if (node, ending_bias) == ("ending", "unswapped") else "b h i j"
    z, attended, whole = f"{pair} c", "b i j h d", "c h d"
    return _Stages(
        attention_stages.project(z, attended, made, whole),
        attention_stages.output(z, attended, whole),
        attention_backward.output(z, attended, whole),
        attention_backward.project(z, attended, made, whole),
        stage(
            "attention_rows_backward",
            _rows_backward,
            f"{z}, b h q k, {pair}, {attended}, b i h j, {z} -> {z}, b h q k",
            whole=f"{whole} j q k",
            padded="k",
        ),
        stage(
            "attention_bias_backward",
            _bias_backward,
            f"{z}, {pair}, {made} -> {z}",
            whole=whole,
            padded=made[-1],
        ),
    )


STAGES = {
    ("starting", "swapped"): _stages("starting", "swapped"),
    ("ending", "swapped"): _stages("ending", "swapped"),
    ("ending", "unswapped"): _stages("ending", "unswapped"),
}
# The starting node makes its bias from z as it is, so the two conventions are one.
STAGES["starting", "unswapped"] = STAGES["starting", "swapped"]


class _Static(NamedTuple):
    node: str
    ending_bias: str
    residual: bool
    epsilon: float
    implementation: str | None

    def only(self, *names: str) -> dict[str, Any]:
        """The settings that a stage takes."""
        return {name: getattr(self, name) for name in (*names, "epsilon", "implementation")}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _op(z, mask, weights, static):
    return _run(z, mask, weights, static, with_lse=False)[0]


def _run(z, mask, weights, static, *, with_lse):
    stages = STAGES[static.node, static.ending_bias]
    *qkv, bias = stages.project(
        (z, mask),
        _pick(weights, attention_stages.PROJECT_GROUPS),
        **static.only("node", "ending_bias"),
    )
    operands = (*qkv, bias, oriented(mask, static.node))
    attended = pair_attention.forward(
        operands, with_lse=with_lse, folded=True, implementation=static.implementation
    )
    o, lse = attended if with_lse else (attended, None)
    out = stages.output(
        (o, z, mask),
        _pick(weights, attention_stages.OUTPUT_GROUPS),
        **static.only("node", "residual"),
    )
    return out, bias, o, lse


def _op_forward(z, mask, weights, static):
    # The bias is kept: it is a fraction H / C of z. q, k and v are three times z and made again.
    out, *kept = _run(z, mask, weights, static, with_lse=True)
    return out, (z, mask, weights, *kept)


def _op_backward(static, residuals, d_out):
    z, weights = residuals[0], residuals[2]
    by_stages = not (_dispatch.kernels_absent() or attention_backward.unsupported(z, weights))
    backward = _backward_by_stages if by_stages else _backward_by_rows
    dz, d_weights = backward(static, residuals, d_out)
    return dz, None, _reference.like(d_weights, weights)


def _backward_by_stages(static, residuals, d_out):
    """Kernel after kernel, each over all pairs, so that q, k, v and their gradients exist whole."""
    z, mask, weights, _, o, lse = residuals
    stages = STAGES[static.node, static.ending_bias]
    d_o, d_gate, d_out_weights = stages.output_backward(
        (o, z, mask, d_out),
        _pick(weights, attention_backward.OUTPUT_GROUPS),
        **static.only("node"),
    )
    projections = static.only("node", "ending_bias")
    *qkv, bias = stages.project(
        (z, mask), _pick(weights, attention_stages.PROJECT_GROUPS), **projections
    )
    operands = (*qkv, bias, oriented(mask, static.node))
    *d_qkv, d_bias = pair_attention.backward(
        operands, o, lse, d_o, folded=True, implementation=static.implementation
    )
    dz, d_weights = stages.project_backward(
        (z, mask, *d_qkv, d_bias, d_gate, d_out if static.residual else None),
        _pick(weights, attention_backward.PROJECT_GROUPS),
        **projections,
    )
    return dz, {**d_weights, **d_out_weights}


def _backward_by_rows(static, residuals, d_out):
    """In plain JAX, a chunk of rows at a time from LayerNorm to output, so that memory is small."""
    z, mask, weights, bias, o, lse = residuals
    stages = STAGES[static.node, static.ending_bias]
    dz_rows, d_bias, d_rows = stages.rows_backward(
        (z, bias, mask, o, lse, d_out),
        _pick(weights, ROWS_GROUPS),
        **static.only("node", "residual"),
    )
    dz_bias, d_made = stages.bias_backward(
        (z, mask, d_bias), _pick(weights, BIAS_GROUPS), **static.only("node", "ending_bias")
    )
    # Both stages read the norm; its gradient is the sum of theirs.
    d_norm = jax.tree.map(jnp.add, d_rows["norm"], d_made["norm"])
    return dz_rows + dz_bias, {**d_rows, **d_made, "norm": d_norm}


_op.defvjp(_op_forward, _op_backward)


def triangle_attention(
    z: jax.Array,
    mask: jax.Array | None,
    params: dict,
    *,
    node: str,
    ending_bias: str = "swapped",
    residual: bool = False,
    epsilon: float = 1e-5,
    implementation: _dispatch.Implementation | None = None,
) -> jax.Array:
    """Updates each pair (i, j) by gated attention over the pairs that share a node with it.

    x = LayerNorm(z); q, k, v, gate and the pair bias are projections of x.
    starting: o_ij = sum_k softmax_k(q_ij . k_ik / sqrt(D) + bias_jk) v_ik
    ending:   o_ij = sum_k softmax_k(q_ij . k_kj / sqrt(D) + bias_ki) v_kj
    update = (sigmoid(gate) * o) W_out

    Args:
      z: pair representation [*, N, N, c_in], float32, bfloat16 or float16, of any batch shape.
      mask: [*, N, N], bool or 0/1 of any dtype, or None for all valid. A masked pair is no key; as
        a query, an output position or a bias it counts as any other. A pair none of whose keys is
        valid attends to nothing: o is zero there.
      params: `init_triangle_attention` makes them; biases may be absent.
      node: "starting" (Algorithm 13) or "ending" (Algorithm 14).
      ending_bias: "swapped", as in Algorithm 14 and AlphaFold 2, or "unswapped", AlphaFold 3's
        bias_ik. The starting node knows no difference.
      residual: return z + update.
      epsilon: of the layer norm.
      implementation: "cuda", "xla", or None for kernels wherever they serve. "xla" is plain JAX:
        forward mode and second derivatives work there.

    Returns:
      The update, [*, N, N, c_in] in z's dtype. Statistics, logits, softmax and sums are float32;
      float32 matrix products follow `jax_default_matmul_precision`. Memory is O(N^2), forward and
      backward.

    Raises:
      ValueError, TypeError: an argument does not fit; says which, and what would.
      NotImplementedError: "cuda" was asked for and cannot serve; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 13 and 14; Abramson et al. 2024,
    supplementary Algorithms 13 and 14.
    """
    op = "triangle_attention"
    shapes = _contract.Shapes(op)
    z, mask = _contract.pair(shapes, z, mask, "... N N c_in")
    _contract.one_of(op, "node", node, NODES)
    _contract.one_of(op, "ending_bias", ending_bias, ENDING_BIASES)
    _contract.one_of(op, "implementation", implementation, _contract.IMPLEMENTATIONS)
    no_heads, c_hidden = (axis_size(params, "q", "kernel", axis) for axis in (1, 2))
    weights = checked(op, params, triangle_attention_spec(shapes["c_in"], c_hidden, no_heads))

    z, mask = shapes.fold(z, mask)
    static = _Static(node, ending_bias, residual, epsilon, implementation)
    if implementation == "xla":
        _dispatch.choose(op, "xla", None, (z, mask))
        out = reference(
            z, mask, weights, node=node, ending_bias=ending_bias, residual=residual, epsilon=epsilon
        )
    else:
        out = _op(z, mask, weights, static)
    return shapes.unfold(out)
