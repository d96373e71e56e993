"""What other libraries' `precision` arguments mean here."""

from typing import Any

import jax
import jax.numpy as jnp

# The values of jax_default_matmul_precision, and of arguments, from the least exact on.
RANKS = {
    "none": 0,
    "default": 0,
    "fastest": 0,
    "bfloat16": 0,
    "high": 1,
    "tensorfloat32": 1,
    "tf32_tf32_f32": 1,
    "tf32_tf32_f32_x3": 2,
    "highest": 3,
    "float32": 3,
    "f32_f32_f32": 3,
}


def check(op: str, precision: Any, dtype: Any) -> None:
    """The error where `precision` asks for more exact products than the layer would compute.

    The layers follow jax_default_matmul_precision. 16-bit inputs have exact products and float32
    sums under any setting.

    Args:
      precision: None, a name, a jax.lax.Precision or DotAlgorithmPreset, or a pair of two alike.
      dtype: of the inputs.

    Raises:
      NotImplementedError: it cannot be honoured; says what would be.
    """
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        precision = precision[0]
    wanted = RANKS.get(str(getattr(precision, "name", precision)).lower())
    current = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if wanted is None:
        raise NotImplementedError(
            f"{op}: precision={precision!r} is not one that these layers can follow. Pass None and "
            f"set jax_default_matmul_precision, to one of {', '.join(list(RANKS)[1:])}."
        )
    exact = jnp.finfo(dtype).bits == 16
    if not exact and wanted > RANKS.get(str(current).lower(), 0):
        raise NotImplementedError(
            f"{op}: precision={precision!r} asks for more than jax_default_matmul_precision="
            f"{current!r}, which the layers follow, forward and backward. Put the step under "
            "jax.default_matmul_precision('highest')."
        )
