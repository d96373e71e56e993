"""Drop-ins for AlphaFold 3's code."""

from typing import ClassVar

import haiku as hk
import jax.numpy as jnp

from genie_tk_jax import convert
from genie_tk_jax._dispatch import Implementation
from genie_tk_jax.haiku import scopes
from genie_tk_jax.haiku.alphafold2 import DIRECTIONS, setting
from genie_tk_jax.ops.triangle_attention import triangle_attention
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication


def _final(global_config, channels):
    zero = global_config.final_init == "zeros"
    return scopes.zeros if zero else scopes.fan_in(channels)


class TriangleMultiplication(hk.Module):
    """`triangle_multiplication` in place of AlphaFold 3's module of this name.

    Constructor, call, scopes, names, shapes, dtypes and initialisers of parameters are the host's.
    `swap` gives it the host's `Config`.

    Source: Abramson et al. 2024, supplementary Algorithms 11 and 12.
    """

    implementation: ClassVar[Implementation | None] = None

    def __init__(self, config, global_config, *, name):
        super().__init__(name=name)
        self.config, self.global_config = config, global_config

    def __call__(self, act, mask):
        """act [N, N, C], mask [N, N] -> the update."""
        direction = setting(DIRECTIONS, "equation", self.config.equation)
        leaves = self._parameters(act.shape[-1], act.dtype)
        layer = f"triangle_multiplication_{direction}"
        return triangle_multiplication(
            act,
            mask,
            convert.to_canonical(leaves, "alphafold3", layer),
            direction=direction,
            implementation=self.implementation,
        )

    @hk.transparent
    def _parameters(self, channels, dtype):
        first, final = scopes.fan_in(channels), _final(self.global_config, channels)
        wide, square = (channels, 2 * channels), (channels, channels)
        return {
            "left_norm_input": scopes.norm("left_norm_input", channels, dtype),
            "projection": scopes.linear("projection", wide, dtype, first),
            "gate": scopes.linear("gate", wide, dtype, final),
            "center_norm": scopes.norm("center_norm", channels, dtype),
            "output_projection": scopes.linear("output_projection", square, dtype, final),
            "gating_linear": scopes.linear("gating_linear", square, dtype, final),
        }


class GridSelfAttention(hk.Module):
    """`triangle_attention` in place of AlphaFold 3's module of this name.

    Constructor, call, scopes, names, shapes, dtypes and initialisers of parameters are the host's.
    `swap` gives it the host's `Config`. Both nodes read the mask transposed, as the host's do.

    Source: Abramson et al. 2024, supplementary Algorithms 13 and 14.
    """

    implementation: ClassVar[Implementation | None] = None

    def __init__(self, config, global_config, transpose, *, name):
        super().__init__(name=name)
        self.config, self.global_config = config, global_config
        self.transpose = transpose

    def __call__(self, act, pair_mask):
        """act [N, N, C], pair_mask [N, N] -> the update."""
        node = "ending" if self.transpose else "starting"
        leaves = self._parameters(act.shape[-1], act.dtype)
        return triangle_attention(
            act,
            # The host swaps the axes of the mask for both nodes, those of act for one: here the
            # ending node swaps both by itself, so only the starting node's has to be swapped.
            pair_mask if self.transpose else jnp.swapaxes(pair_mask, -1, -2),
            convert.to_canonical(leaves, "alphafold3", f"triangle_attention_{node}_node"),
            node=node,
            ending_bias="unswapped",
            implementation=self.implementation,
        )

    @hk.transparent
    def _parameters(self, channels, dtype):
        heads = self.config.num_head
        width = max(channels // heads, 16)
        first, final = scopes.fan_in(channels), _final(self.global_config, heads * width)
        shapes = {
            "pair_bias_projection": ((channels, heads), first),
            "q_projection": ((heads, width, channels), first),
            "k_projection": ((heads, width, channels), first),
            "v_projection": ((channels, heads, width), first),
            "gating_query": ((heads * width, channels), scopes.zeros),
            "output_projection": ((heads * width, channels), final),
        }
        leaves = {"act_norm": scopes.norm("act_norm", channels, dtype)}
        for name, (shape, init) in shapes.items():
            leaves[name] = scopes.linear(name, shape, dtype, init)
        return leaves
