"""A call of an FFI target as Python makes it, and the arrays that such calls are made of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genie_tk_jax import _ffi


class Call(NamedTuple):
    """Operands by name and in order, results like these arrays, and attributes."""

    operands: dict[str, np.ndarray]
    results: list[np.ndarray]
    attributes: dict[str, Any]

    def run(self, target: str, **changes):
        """Calls the target with other operands or attributes; None leaves an operand out."""
        operands, attributes = dict(self.operands), dict(self.attributes)
        for name, value in changes.items():
            (operands if name in operands else attributes)[name] = value
        results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self.results]
        return _ffi.call(target, results, *operands.values(), **attributes)


def low(*shape: int) -> np.ndarray:
    return np.zeros(shape, jnp.bfloat16)


def full(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def mask(*shape: int) -> np.ndarray:
    return np.zeros(shape, bool)
