"""Drop-ins for AlphaFold 2's code: DeepMind's, ColabFold's and ColabDesign's."""

from typing import ClassVar

import haiku as hk
import jax

from genie_tk_jax import convert
from genie_tk_jax._dispatch import Implementation
from genie_tk_jax.haiku import scopes
from genie_tk_jax.ops.triangle_attention import triangle_attention
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication

DIRECTIONS = {"ikc,jkc->ijc": "outgoing", "kjc,kic->ijc": "incoming"}
NODES = {"per_row": "starting", "per_column": "ending"}


def setting(known: dict[str, str], name: str, value: str) -> str:
    """What a host's setting means here; the error names those that are known."""
    if value not in known:
        raise ValueError(f"config.{name} must be one of {', '.join(known)}; got {value!r}.")
    return known[value]


def _updated(call, z: jax.Array, residual: jax.Array | None) -> jax.Array:
    """The update, or with ColabFold's `residual` that plus the update, in one pass if it is z."""
    if residual is None or residual is z:
        return call(residual=residual is z)
    return residual + call(residual=False)


class TriangleMultiplication(hk.Module):
    """`triangle_multiplication` in place of AlphaFold 2's module of this name.

    Constructor, call, scopes, names, shapes, dtypes and initialisers of parameters are the host's,
    fused or not by `config.fuse_projection_weights`.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12.
    """

    takes_residual: ClassVar[bool] = True
    implementation: ClassVar[Implementation | None] = None

    def __init__(self, config, global_config, name="triangle_multiplication"):
        super().__init__(name=name)
        self.config, self.global_config = config, global_config

    def __call__(self, left_act, left_mask, is_training=True, residual=None):
        """left_act [N, N, c_z], left_mask [N, N] -> the update, or residual + update."""
        del is_training
        direction = setting(DIRECTIONS, "equation", self.config.equation)
        fused = self.config.fuse_projection_weights
        leaves = (self._fused if fused else self._unfused)(left_act.shape[-1], left_act.dtype)
        host = "alphafold2_fused" if fused else "alphafold2"
        params = convert.to_canonical(leaves, host, f"triangle_multiplication_{direction}")

        def call(residual):
            return triangle_multiplication(
                left_act,
                left_mask,
                params,
                direction=direction,
                residual=residual,
                implementation=self.implementation,
            )

        return _updated(call, left_act, residual)

    @hk.transparent
    def _final(self, channels):
        return scopes.zeros if self.global_config.zero_init else scopes.fan_in(channels)

    @hk.transparent
    def _fused(self, c_z, dtype):
        hidden = self.config.num_intermediate_channel
        shape, first = (c_z, 2 * hidden), scopes.fan_in(c_z)
        return {
            "left_norm_input": scopes.norm("left_norm_input", c_z, dtype),
            "projection": scopes.linear("projection", shape, dtype, first, scopes.zeros),
            "gate": scopes.linear("gate", shape, dtype, self._final(c_z), scopes.ones),
            "center_norm": scopes.norm("center_norm", hidden, dtype),
            **self._output(c_z, dtype),
        }

    @hk.transparent
    def _unfused(self, c_z, dtype):
        hidden = self.config.num_intermediate_channel
        shape, first, final = (c_z, hidden), scopes.fan_in(c_z), self._final(c_z)
        leaves = {"layer_norm_input": scopes.norm("layer_norm_input", c_z, dtype)}
        for name in ("left_projection", "right_projection"):
            leaves[name] = scopes.linear(name, shape, dtype, first, scopes.zeros)
        for name in ("left_gate", "right_gate"):
            leaves[name] = scopes.linear(name, shape, dtype, final, scopes.ones)
        leaves["center_layer_norm"] = scopes.norm("center_layer_norm", hidden, dtype)
        return {**leaves, **self._output(c_z, dtype)}

    @hk.transparent
    def _output(self, c_z, dtype):
        hidden = self.config.num_intermediate_channel
        final = self._final(hidden)
        out = scopes.linear("output_projection", (hidden, c_z), dtype, final, scopes.zeros)
        gate = scopes.linear("gating_linear", (c_z, c_z), dtype, self._final(c_z), scopes.ones)
        return {"output_projection": out, "gating_linear": gate}


class TriangleAttention(hk.Module):
    """`triangle_attention` in place of AlphaFold 2's module of this name.

    Constructor, call, scopes, names, shapes, dtypes and initialisers of parameters are the host's.
    `global_config.subbatch_size` is not needed: memory is O(N^2) without it.

    Source: Jumper et al. 2021, supplementary Algorithms 13 and 14.
    """

    takes_residual: ClassVar[bool] = True
    implementation: ClassVar[Implementation | None] = None

    def __init__(self, config, global_config, name="triangle_attention"):
        super().__init__(name=name)
        self.config, self.global_config = config, global_config

    def __call__(self, pair_act, pair_mask, is_training=False, residual=None):
        """pair_act [N, N, c_z], pair_mask [N, N] -> the update, or residual + update."""
        del is_training
        node = setting(NODES, "orientation", self.config.orientation)
        leaves = self._parameters(pair_act.shape[-1], pair_act.dtype)
        params = convert.to_canonical(leaves, "alphafold2", f"triangle_attention_{node}_node")

        def call(residual):
            return triangle_attention(
                pair_act,
                pair_mask,
                params,
                node=node,
                residual=residual,
                implementation=self.implementation,
            )

        return _updated(call, pair_act, residual)

    def _widths(self, c_z):
        config, heads = self.config, self.config.num_head
        widths = [config.get(key, c_z) for key in ("key_dim", "value_dim")]
        if widths[0] != widths[1] or widths[0] % heads or not config.gating:
            raise ValueError(
                "triangle attention must have gating=True and key_dim = value_dim, a multiple of "
                f"num_head; got gating={config.gating}, key_dim={widths[0]}, "
                f"value_dim={widths[1]}, num_head={heads}. Leave this layer to the host."
            )
        return heads, widths[0] // heads

    @hk.transparent
    def _parameters(self, c_z, dtype):
        heads, width = self._widths(c_z)
        normal = hk.initializers.RandomNormal(stddev=c_z**-0.5)
        glorot = hk.initializers.VarianceScaling(1.0, "fan_avg", "uniform")
        final = scopes.zeros if self.global_config.zero_init else glorot
        bias = hk.get_parameter("feat_2d_weights", (c_z, heads), dtype, normal)
        leaves = {"": {"feat_2d_weights": bias}}
        leaves["query_norm"] = scopes.norm("query_norm", c_z, dtype)
        projection = (c_z, heads, width)
        inner: dict[str, tuple[tuple[int, ...], hk.initializers.Initializer]] = {
            "query_w": (projection, glorot),
            "key_w": (projection, glorot),
            "value_w": (projection, glorot),
            "gating_w": (projection, scopes.zeros),
            "gating_b": ((heads, width), scopes.ones),
            "output_w": ((heads, width, c_z), final),
            "output_b": ((c_z,), scopes.zeros),
        }
        with hk.name_scope("attention"):
            leaves["attention"] = {
                name: hk.get_parameter(name, shape, dtype, init)
                for name, (shape, init) in inner.items()
            }
        return leaves
