"""The kernels' FFI targets: loads and registers them, and calls one. Only this file names jax.ffi.

`_C` is absent from a package that was built without nvcc. `AVAILABLE` then is False and
`WHY_ABSENT` says why, in words that fit into a refusal.
"""

import importlib
import warnings
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np


def _load() -> tuple[dict[str, Any], tuple[int, ...], str | None]:
    """The targets, the compute capabilities they were built for, and why there are none."""
    name = "genie_tk_jax._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {}, (), "genie_tk_jax was installed without kernels, as no nvcc was found"
    except ImportError as error:
        why = f"the kernels cannot be loaded: {error}"
        warnings.warn(f"genie_tk_jax runs on XLA: {why}", RuntimeWarning, stacklevel=2)
        return {}, (), why
    return module.targets, module.compute_capabilities, None


TARGETS, COMPUTE_CAPABILITIES, WHY_ABSENT = _load()
"""Handlers by name; compute capabilities as 10 * major + minor; None, or why there are none."""

AVAILABLE = WHY_ABSENT is None

for _name, _handler in TARGETS.items():
    jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")

Attribute = bool | int | float | str


def call(
    target: str,
    results: Any,
    *operands: jax.Array | None,
    aliases: dict[int, int] | None = None,
    **attributes: Attribute,
) -> Any:
    """Calls a target on arrays in row-major order.

    Args:
      target: its name, one of `TARGETS`.
      results: a `jax.ShapeDtypeStruct` or a sequence of them.
      operands: in the order of the handler's parameters; None for one that is absent.
      aliases: which operands give their memory to which results, by number.
      attributes: under the handler's names; int is int64 there and float is float32.

    Returns:
      An array or a tuple of arrays, as `results` is.
    """
    # Made by JAX, so as to be traced: custom_partitioning takes no constants.
    arrays = [jnp.zeros(0, jnp.uint8) if x is None else x for x in operands]
    typed = {name: _typed(value) for name, value in attributes.items()}
    return jax.ffi.ffi_call(target, results, input_output_aliases=aliases)(*arrays, **typed)


def _typed(value: Attribute) -> Any:
    # jax.ffi sends a Python float as float64.
    if isinstance(value, bool | str):
        return value
    return np.int64(value) if isinstance(value, int | np.integer) else np.float32(value)
