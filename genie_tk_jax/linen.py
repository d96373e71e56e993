"""The four layers as flax.linen modules: parameters and one call each, no maths."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen

from genie_tk_jax._dispatch import Implementation
from genie_tk_jax.ops.triangle_attention import triangle_attention
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication
from genie_tk_jax.params import (
    Params,
    Spec,
    initialise_group,
    triangle_attention_spec,
    triangle_multiplication_spec,
)


def _params(module: linen.Module, spec: Spec, **how: Any) -> Params:
    """One linen parameter a group, the dict of its leaves: "params" is the canonical tree."""
    return {
        group: module.param(group, lambda key, leaves=leaves: initialise_group(key, leaves, **how))
        for group, leaves in spec.items()
    }


class _TriangleMultiplication(linen.Module):
    """`triangle_multiplication` with its parameters, in the canonical tree of `params`.

    Attributes:
      c_z: channels of the pair representation.
      c_hidden: channels of the contraction.
      use_bias: biases in the four linear layers.
      residual: return z + update.
      epsilon: of both layer norms.
      init_scheme: "alphafold", under which the first update is zero, or "random".
      dtype: z is cast to it; None computes in z's own.
      param_dtype: dtype of the parameters.
      implementation: "cuda", "xla", or None for kernels wherever they serve.
    """

    direction: ClassVar[str]

    c_z: int
    c_hidden: int
    use_bias: bool = True
    residual: bool = False
    epsilon: float = 1e-5
    init_scheme: str = "alphafold"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Implementation | None = None

    @linen.compact
    def __call__(self, z: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """z [*, N, N, c_z], mask [*, N, N] or None -> [*, N, N, c_z]."""
        spec = triangle_multiplication_spec(self.c_z, self.c_hidden)
        how = {"use_bias": self.use_bias, "init": self.init_scheme, "dtype": self.param_dtype}
        return triangle_multiplication(
            z if self.dtype is None else z.astype(self.dtype),
            mask,
            _params(self, spec, **how),
            direction=self.direction,
            residual=self.residual,
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class TriangleMultiplicationOutgoing(_TriangleMultiplication):
    __doc__ = f"Algorithm 11. {_TriangleMultiplication.__doc__}"
    direction: ClassVar[str] = "outgoing"


class TriangleMultiplicationIncoming(_TriangleMultiplication):
    __doc__ = f"Algorithm 12. {_TriangleMultiplication.__doc__}"
    direction: ClassVar[str] = "incoming"


class _TriangleAttention(linen.Module):
    """`triangle_attention` with its parameters, in the canonical tree of `params`.

    Attributes:
      c_in: channels of the pair representation.
      c_hidden: channels per head.
      no_heads: attention heads.
      use_bias: biases in gate and output.
      ending_bias: "swapped" (AlphaFold 2) or "unswapped" (AlphaFold 3); only the ending node
        knows a difference.
      residual: return z + update.
      epsilon: of the layer norm.
      init_scheme: "alphafold", under which the first update is zero, or "random".
      dtype: z is cast to it; None computes in z's own.
      param_dtype: dtype of the parameters.
      implementation: "cuda", "xla", or None for kernels wherever they serve.
    """

    node: ClassVar[str]

    c_in: int
    c_hidden: int
    no_heads: int
    use_bias: bool = True
    ending_bias: str = "swapped"
    residual: bool = False
    epsilon: float = 1e-5
    init_scheme: str = "alphafold"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: Implementation | None = None

    @linen.compact
    def __call__(self, z: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """z [*, N, N, c_in], mask [*, N, N] or None -> [*, N, N, c_in]."""
        spec = triangle_attention_spec(self.c_in, self.c_hidden, self.no_heads)
        how = {"use_bias": self.use_bias, "init": self.init_scheme, "dtype": self.param_dtype}
        return triangle_attention(
            z if self.dtype is None else z.astype(self.dtype),
            mask,
            _params(self, spec, **how),
            node=self.node,
            ending_bias=self.ending_bias,
            residual=self.residual,
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class TriangleAttentionStartingNode(_TriangleAttention):
    __doc__ = f"Algorithm 13. {_TriangleAttention.__doc__}"
    node: ClassVar[str] = "starting"


class TriangleAttentionEndingNode(_TriangleAttention):
    __doc__ = f"Algorithm 14. {_TriangleAttention.__doc__}"
    node: ClassVar[str] = "ending"
