"""What the public functions ask of their arguments, and the words of the refusal."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = (None, "cuda", "xla")
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Shapes:
    """Binds the axis names of several arguments of one call to sizes, and says what disagrees.

    A pattern names the axes of an argument, as in "... N N c_z"; the leading "..." is the batch
    shape, any number of axes. A name means the same size wherever it stands.
    """

    def __init__(self, op: str):
        self.op = op
        self._batch: tuple[int, ...] | None = None
        self._sizes: dict[str, tuple[int, str]] = {}

    def __getitem__(self, axis: str) -> int:
        return self._sizes[axis][0]

    def bind(self, name: str, array: Any, pattern: str, cure: str) -> None:
        """Checks `array` against `pattern`; the error ends with `cure`."""
        if not hasattr(array, "shape"):
            raise TypeError(
                f"{self.op}: {name} must be an array [{pattern}]; "
                f"got {type(array).__name__}. {cure}"
            )
        axes = pattern.split()[1:]
        shape = tuple(array.shape)
        if len(shape) < len(axes):
            raise self._error(name, pattern, f"{len(shape)} axes, {shape}", cure)
        batch, own = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        if self._batch is None:
            self._batch = batch
        elif batch != self._batch:
            got = f"shape {shape}, whose batch is {batch}, not {self._batch} as earlier arguments'"
            raise self._error(name, pattern, got, cure)
        for axis, size in zip(axes, own, strict=True):
            bound, origin = self._sizes.setdefault(axis, (size, name))
            if size != bound:
                got = f"shape {shape}, with {axis} = {size} where {origin} has {axis} = {bound}"
                raise self._error(name, pattern, got, cure)

    def fold(self, *arrays: Any) -> tuple[Any, ...]:
        """The arrays (or None) with their batch shape as one leading axis."""
        batch = self._batch or ()
        return tuple(
            None if x is None else x.reshape(math.prod(batch), *x.shape[len(batch) :])
            for x in arrays
        )

    def unfold(self, array: Any) -> jax.Array:
        """The array with the leading axis that `fold` made as the batch shape again."""
        return array.reshape(*(self._batch or ()), *array.shape[1:])

    def _error(self, name: str, pattern: str, got: str, cure: str) -> ValueError:
        return ValueError(f"{self.op}: {name} must be [{pattern}]; got {got}. {cure}")


def floating(op: str, name: str, array: Any) -> jax.Array:
    """`array` as a JAX array of one of the dtypes the ops compute in."""
    if str(array.dtype) not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be one of {', '.join(DTYPES)}; got {array.dtype}. "
            f"Cast it, for example {name}.astype(jnp.bfloat16)."
        )
    return jnp.asarray(array)


def same_dtype(op: str, **arrays: jax.Array) -> None:
    """All arrays share the dtype of the first."""
    (first, model), *rest = arrays.items()
    for name, array in rest:
        if array.dtype != model.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, {model.dtype}; got {array.dtype}. "
                f"Cast it with {name}.astype({first}.dtype)."
            )


def one_of(op: str, name: str, value: Any, options: tuple) -> None:
    """`value` is one of `options`."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{op}: {name} must be one of {listed}; got {value!r}.")


def truth(op: str, mask: Any) -> jax.Array | None:
    """A mask as bool: valid where it is not 0. None stays None, which is all valid.

    Only NumPy input is looked at for values other than 0 and 1: to look at a device array would
    wait for it.
    """
    if mask is None:
        return None
    if isinstance(mask, np.ndarray) and not np.isin(mask, (0, 1)).all():
        worst = mask[~np.isin(mask, (0, 1))].flat[0]
        raise ValueError(
            f"{op}: mask must hold only 0 and 1 (or bool); got {worst}. "
            "Threshold it, for example mask > 0.5."
        )
    mask = jnp.asarray(mask)
    return mask if mask.dtype == bool else mask != 0  # XLA would run a kernel to compare a bool


def pair(shapes: Shapes, z: Any, mask: Any, pattern: str) -> tuple[jax.Array, jax.Array | None]:
    """A pair representation and its mask, which has z's axes less the channels."""
    shapes.bind(
        "z", z, pattern, "Pass a pair representation, channels last; layers need it square, [N, N]."
    )
    z = floating(shapes.op, "z", z)
    if mask is not None:
        cure = "Pass one value a pair, for instance valid[:, None] * valid[None, :], or None."
        shapes.bind("mask", mask, pattern.rsplit(" ", 1)[0], cure)
    return z, truth(shapes.op, mask)
