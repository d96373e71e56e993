"""tokamax's `triangle_multiplication` by genie_tk_jax's layer.

    from genie_tk_jax.compat.tokamax import triangle_multiplication

Same signature, layouts and results; x may have batch axes, and mask may be None.
"""

from collections.abc import Sequence
from typing import Any

import jax

from genie_tk_jax import _contract, convert
from genie_tk_jax.compat import precision as precisions
from genie_tk_jax.ops import triangle_multiplication as multiplication
from genie_tk_jax.ops.contract import DIRECTIONS

OP = "triangle_multiplication"


def triangle_multiplication(
    x: jax.Array,
    mask: jax.Array | None,
    projection_in_weights: jax.Array,
    gate_in_weights: jax.Array,
    projection_out_weights: jax.Array,
    gate_out_weights: jax.Array,
    layernorm_in_scale: jax.Array,
    layernorm_in_offset: jax.Array,
    layernorm_out_scale: jax.Array,
    layernorm_out_offset: jax.Array,
    triangle_type: str,
    *,
    precision: Any = None,
    epsilon: float = 1e-6,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Triangle multiplication, Algorithms 11 and 12, with tokamax's arguments.

    Args:
      x: [*, N, N, C].
      mask: [*, N, N]; valid where it is not 0.
      projection_in_weights, gate_in_weights: [C, 2, H]; for incoming the first of the two is the
        paper's b, as in AlphaFold 2.
      projection_out_weights: [H, C].
      gate_out_weights: [C, C].
      layernorm_in_scale, layernorm_in_offset: [C].
      layernorm_out_scale, layernorm_out_offset: [H].
      triangle_type: "outgoing" or "incoming".
      precision: at most what jax_default_matmul_precision gives; float32 only.
      epsilon: of both layer norms; models are trained with 1e-5, which is not the default here.
      implementation: "xla", "cuda", a sequence of which the first that serves is taken, or None
        for the kernel wherever it serves.

    Returns:
      [*, N, N, C] in x's dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; says which. An output width other than C is
        none that a layer can have.
      NotImplementedError: precision or implementation cannot be honoured; says why.

    Source: Jumper et al. 2021, supplementary Algorithms 11 and 12.
    """
    _contract.one_of(OP, "triangle_type", triangle_type, DIRECTIONS)
    x = _contract.floating(OP, "x", x)
    precisions.check(OP, precision, x.dtype)
    weights = {
        "projection_in_weights": projection_in_weights,
        "gate_in_weights": gate_in_weights,
        "projection_out_weights": projection_out_weights,
        "gate_out_weights": gate_out_weights,
        "layernorm_in_scale": layernorm_in_scale,
        "layernorm_in_offset": layernorm_in_offset,
        "layernorm_out_scale": layernorm_out_scale,
        "layernorm_out_offset": layernorm_out_offset,
    }
    params = convert.to_canonical(weights, "tokamax", f"triangle_multiplication_{triangle_type}")
    if implementation is None or isinstance(implementation, str):
        names: tuple[Any, ...] = (implementation,)
    else:
        names = tuple(implementation)
    if not names:
        raise ValueError(f"{OP}: implementation must name at least one; got {implementation!r}.")
    reasons = []
    for name in names:
        if name not in _contract.IMPLEMENTATIONS:
            reasons.append(f"{name!r} is tokamax's own; here there are 'cuda', 'xla' and None")
            continue
        try:
            return multiplication.triangle_multiplication(
                x, mask, params, direction=triangle_type, epsilon=epsilon, implementation=name
            )
        except NotImplementedError as error:
            reasons.append(str(error))
    raise NotImplementedError(f"{OP}: no implementation serves: {'; '.join(reasons)}.")
