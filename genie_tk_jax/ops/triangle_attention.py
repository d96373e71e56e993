"""Triangle attention around the starting and the ending node: project, attend, output."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax import _contract, _dispatch, _reference
from genie_tk_jax._stage import stage
from genie_tk_jax.ops import pair_attention
from genie_tk_jax.params import axis_size, checked, triangle_attention_spec

NODES = ("starting", "ending")
ENDING_BIASES = ("swapped", "unswapped")
PROJECT_GROUPS = ("norm", "pair_bias", "q", "k", "v")
OUTPUT_GROUPS = ("norm", "gate", "out")
ROWS_GROUPS = ("norm", "q", "k", "v", "gate", "out")
BIAS_GROUPS = ("norm", "pair_bias")


def _pick(weights, groups):
    return {group: weights[group] for group in groups}


def _oriented(x, node):
    """x [B, I, J, ...] with the axis attended over last of the two pair axes."""
    return x if x is None or node == "starting" else jnp.swapaxes(x, 1, 2)


def _normed(z, mask, weights, epsilon):
    """z [B, J, C] of one row, its garbage read as zeros, and its layer norm."""
    z = _reference.readable(z, mask)
    return z, _reference.layer_norm(z, **weights["norm"], epsilon=epsilon)


def _bias(arrays, weights, *, node, ending_bias, epsilon):
    """z [B, N, N, C], mask -> the pair bias [B, H, Q, K] in attention order."""
    z, mask = arrays
    if ending_bias == "swapped":
        z, mask = _oriented(z, node), _oriented(mask, node)

    def row(z, mask):
        _, x = _normed(z, mask, weights, epsilon)
        return _reference.linear("bkc,ch->bkh", x, weights["pair_bias"])

    return jnp.moveaxis(_over_pairs(row, z, mask), -1, 1)


def _over_pairs(row, *operands):
    """`row` over the rows of pairwise operands, the first [B, I, J, C], in chunks."""
    batch, _, columns, channels = operands[0].shape
    return _reference.over_rows(row, 4 * batch * columns * channels, operands)


def _queries_keys_values(x, weights):
    q, k, v = (_reference.linear("bjc,chd->bjhd", x, weights[name]) for name in "qkv")
    return q, k, v


def _gated(o, z, x, weights, residual):
    """One row: o [B, J, H, D] and z, LayerNorm(z) [B, J, C] -> the update, or z + update."""
    gate = jax.nn.sigmoid(_reference.linear("bjc,chd->bjhd", x, weights["gate"]))
    update = _reference.linear("bjhd,hdc->bjc", gate * o, weights["out"])
    return z + update if residual else update


def _rows(arrays, weights, *, node, residual, epsilon):
    """z [B, N, N, C], bias [B, H, Q, K], mask -> [B, N, N, C]: the layer once the bias is made."""
    z, bias, mask = arrays
    # What chunks share is float32, in which the gradients of many chunks sum.
    weights = _reference.wide(weights)
    bias = bias.astype(_reference.statistics_dtype(bias.dtype))

    def row(z, mask):
        z, x = _normed(z, mask, weights, epsilon)
        o, _ = pair_attention.softmax_of_row(*_queries_keys_values(x, weights), bias, mask)
        return _gated(o, z, x, weights, residual)

    operands = _oriented(z, node), _oriented(mask, node)
    return _oriented(_reference.over_rows(row, math.prod(bias.shape), operands), node)


def reference(z, mask, weights, *, node, ending_bias, residual, epsilon):
    """The layer on z [B, N, N, C] and mask bool [B, N, N] or None, in plain JAX.

    Rows go from layer norm to output in chunks, so that nothing but the bias spans more rows.
    """
    bias = _bias((z, mask), weights, node=node, ending_bias=ending_bias, epsilon=epsilon)
    return _rows((z, bias, mask), weights, node=node, residual=residual, epsilon=epsilon)


def _project(arrays, weights, *, node, ending_bias, epsilon):
    """z [B, N, N, C], mask -> q, k, v [B, I, J, H, D] in attention order, bias [B, H, Q, K]."""
    z, mask = arrays

    def row(z, mask):
        return _queries_keys_values(_normed(z, mask, weights, epsilon)[1], weights)

    bias = _bias(arrays, weights, node=node, ending_bias=ending_bias, epsilon=epsilon)
    return *_over_pairs(row, _oriented(z, node), _oriented(mask, node)), bias


def _output(arrays, weights, *, node, residual, epsilon):
    """o [B, I, J, H, D] in attention order, z [B, N, N, C], mask -> [B, N, N, C]."""
    o, z, mask = arrays

    def row(z, mask, o):
        z, x = _normed(z, mask, weights, epsilon)
        return _gated(o, z, x, weights, residual)

    return _over_pairs(row, z, mask, _oriented(o, node))


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
    """z, mask, dbias -> dz and the weights' gradients of `_bias`."""
    z, mask, d_bias = arrays
    function = partial(_bias, **static)
    (dz,), d_weights = _reference.pullback(
        function, (z,), (mask,), weights, d_bias.astype(z.dtype), in_turn=True
    )
    return dz, d_weights


class _Stages(NamedTuple):
    project: Callable
    output: Callable
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
        stage(
            "attention_project",
            _project,
            f"{z}, {pair} -> {attended}, {attended}, {attended}, {made}",
            whole=whole,
        ),
        stage("attention_output", _output, f"{attended}, {z}, {pair} -> {z}", whole=whole),
        stage(
            "attention_rows_backward",
            _rows_backward,
            f"{z}, b h q k, {pair}, {attended}, b i h j, {z} -> {z}, b h q k",
            whole=f"{whole} j q k",
        ),
        stage(
            "attention_bias_backward", _bias_backward, f"{z}, {pair}, {made} -> {z}", whole=whole
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
        (z, mask), _pick(weights, PROJECT_GROUPS), **static.only("node", "ending_bias")
    )
    operands = (*qkv, bias, _oriented(mask, static.node))
    attended = pair_attention.forward(
        operands, with_lse=with_lse, implementation=static.implementation
    )
    o, lse = attended if with_lse else (attended, None)
    out = stages.output(
        (o, z, mask), _pick(weights, OUTPUT_GROUPS), **static.only("node", "residual")
    )
    return out, bias, o, lse


def _op_forward(z, mask, weights, static):
    # The bias is kept: it is a fraction H / C of z. q, k and v are three times z and made again.
    out, *kept = _run(z, mask, weights, static, with_lse=True)
    return out, (z, mask, weights, *kept)


def _op_backward(static, residuals, d_out):
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
    d_weights = {**d_rows, **d_made, "norm": d_norm}
    return dz_rows + dz_bias, None, _reference.like(d_weights, weights)


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
