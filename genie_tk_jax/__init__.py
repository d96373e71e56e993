"""Triangle multiplication and triangle attention for JAX: functions, Flax modules, CUDA kernels."""

from genie_tk_jax._dispatch import Choice, explain
from genie_tk_jax.nnx import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from genie_tk_jax.ops.contract import contract
from genie_tk_jax.ops.gated_output import gated_output
from genie_tk_jax.ops.gated_projection import gated_projection
from genie_tk_jax.ops.pair_attention import pair_attention
from genie_tk_jax.ops.triangle_attention import triangle_attention
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication
from genie_tk_jax.params import init_triangle_attention, init_triangle_multiplication

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "TriangleAttentionEndingNode",
    "TriangleAttentionStartingNode",
    "TriangleMultiplicationIncoming",
    "TriangleMultiplicationOutgoing",
    "contract",
    "explain",
    "gated_output",
    "gated_projection",
    "init_triangle_attention",
    "init_triangle_multiplication",
    "pair_attention",
    "triangle_attention",
    "triangle_multiplication",
]
