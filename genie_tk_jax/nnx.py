"""The four layers as flax.nnx modules: parameters and one call each, no maths."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from genie_tk_jax._dispatch import Implementation
from genie_tk_jax.ops.triangle_attention import triangle_attention
from genie_tk_jax.ops.triangle_multiplication import triangle_multiplication
from genie_tk_jax.params import (
    Params,
    Spec,
    initialise,
    triangle_attention_spec,
    triangle_multiplication_spec,
)


def _hold(module: nnx.Module, spec: Spec, rngs: nnx.Rngs, **how: Any) -> tuple[str, ...]:
    """Gives `module` an attribute for each group of leaves; returns the names of the groups."""
    values = initialise(rngs.params(), spec, **how)
    for group, leaves in values.items():
        setattr(module, group, nnx.Dict({name: nnx.Param(leaf) for name, leaf in leaves.items()}))
    return tuple(values)


def _held(module: nnx.Module, groups: tuple[str, ...]) -> Params:
    return {
        group: {name: param[...] for name, param in getattr(module, group).items()}
        for group in groups
    }


class _TriangleMultiplication(nnx.Module):
    """`triangle_multiplication` with its parameters, in the canonical tree of `params`.

    Args:
      c_z: channels of the pair representation.
      c_hidden: channels of the contraction.
      use_bias: biases in the four linear layers.
      residual: return z + update.
      epsilon: of both layer norms.
      init_scheme: "alphafold", under which the first update is zero, or "random".
      dtype: z is cast to it; None computes in z's own.
      param_dtype: dtype of the parameters.
      implementation: "cuda", "xla", or None for kernels wherever they serve.
      rngs: their `params` stream draws the parameters.
    """

    direction: ClassVar[str]

    def __init__(
        self,
        c_z: int,
        c_hidden: int,
        *,
        use_bias: bool = True,
        residual: bool = False,
        epsilon: float = 1e-5,
        init_scheme: str = "alphafold",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        spec = triangle_multiplication_spec(c_z, c_hidden)
        self._groups = _hold(
            self, spec, rngs, use_bias=use_bias, init=init_scheme, dtype=param_dtype
        )
        self.residual, self.epsilon = residual, epsilon
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, z: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """z [*, N, N, c_z], mask [*, N, N] or None -> [*, N, N, c_z]."""
        return triangle_multiplication(
            z if self.dtype is None else z.astype(self.dtype),
            mask,
            _held(self, self._groups),
            direction=self.direction,
            residual=self.residual,
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class TriangleMultiplicationOutgoing(_TriangleMultiplication):
    __doc__ = f"Algorithm 11. {_TriangleMultiplication.__doc__}"
    direction = "outgoing"


class TriangleMultiplicationIncoming(_TriangleMultiplication):
    __doc__ = f"Algorithm 12. {_TriangleMultiplication.__doc__}"
    direction = "incoming"


class _TriangleAttention(nnx.Module):
    """`triangle_attention` with its parameters, in the canonical tree of `params`.

    Args:
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
      rngs: their `params` stream draws the parameters.
    """

    node: ClassVar[str]

    def __init__(
        self,
        c_in: int,
        c_hidden: int,
        no_heads: int,
        *,
        use_bias: bool = True,
        ending_bias: str = "swapped",
        residual: bool = False,
        epsilon: float = 1e-5,
        init_scheme: str = "alphafold",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        spec = triangle_attention_spec(c_in, c_hidden, no_heads)
        self._groups = _hold(
            self, spec, rngs, use_bias=use_bias, init=init_scheme, dtype=param_dtype
        )
        self.ending_bias, self.residual, self.epsilon = ending_bias, residual, epsilon
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(self, z: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """z [*, N, N, c_in], mask [*, N, N] or None -> [*, N, N, c_in]."""
        return triangle_attention(
            z if self.dtype is None else z.astype(self.dtype),
            mask,
            _held(self, self._groups),
            node=self.node,
            ending_bias=self.ending_bias,
            residual=self.residual,
            epsilon=self.epsilon,
            implementation=self.implementation,
        )


class TriangleAttentionStartingNode(_TriangleAttention):
    __doc__ = f"Algorithm 13. {_TriangleAttention.__doc__}"
    node = "starting"


class TriangleAttentionEndingNode(_TriangleAttention):
    __doc__ = f"Algorithm 14. {_TriangleAttention.__doc__}"
    node = "ending"
