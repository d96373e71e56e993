"""Kernel or reference: the one place that chooses, and explains."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from genie_tk_jax import _ffi

Implementation = Literal["cuda", "xla"]


class Choice(NamedTuple):
    """Which implementation one op of a call runs on the GPU, why, and on what operands."""

    op: str
    implementation: Implementation
    reason: str
    operands: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.reason}) on {self.operands}"


@functools.cache
def kernels_absent() -> str | None:
    """Why no kernel at all can run here, or None: by what was built and which devices there are."""
    if _ffi.WHY_ABSENT is not None:
        return _ffi.WHY_ABSENT
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "JAX sees no CUDA device"
    built = [f"{number // 10}.{number % 10}" for number in _ffi.COMPUTE_CAPABILITIES]
    for device in devices:
        if device.compute_capability not in built:
            return (
                f"the kernels are built for compute capability {', '.join(built)}; "
                f"{device.device_kind} has {device.compute_capability}"
            )
    return None


# A new value misses every cache of jit, so that `explain` sees each op traced anew.
_explained_call = jax.make_user_context(None)
_call_numbers = itertools.count(1)
_record: ContextVar[dict[Choice, None] | None] = ContextVar("_record", default=None)


def choose(
    op: str, implementation: str | None, refusal: str | None, operands: Any
) -> Implementation:
    """The implementation that serves `op`; `refusal` says why the kernel cannot, or is None.

    Raises:
      NotImplementedError: "cuda" was asked for and cannot serve; says why.
    """
    if implementation == "xla":
        choice, reason = "xla", "implementation='xla' was asked for"
    elif refusal is None:
        choice, reason = "cuda", "the kernel serves these arguments"
    elif implementation == "cuda":
        raise NotImplementedError(
            f"{op}(implementation='cuda'): {refusal}. "
            "implementation=None takes XLA where no kernel serves."
        )
    else:
        choice, reason = "xla", refusal
    record = _record.get()
    if record is not None:
        record[Choice(op, choice, reason, _described(operands))] = None
    return choice


def _described(operands: Any) -> str:
    leaves = jax.tree.leaves(operands)
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)


@contextmanager
def _recording() -> Iterator[dict[Choice, None]]:
    record: dict[Choice, None] = {}
    token = _record.set(record)
    try:
        with _explained_call(next(_call_numbers)):
            yield record
    finally:
        _record.reset(token)


def explain(fn: Callable, *args: Any, **kwargs: Any) -> tuple[Choice, ...]:
    """Says for each op that `fn(*args, **kwargs)` calls which implementation runs and why.

    `fn` is traced and not run; arrays among the arguments may be `jax.ShapeDtypeStruct`. Functions
    under jit, grad, vmap, scan and remat are seen through, their backward ops included.

    Returns:
      A `Choice` (op, implementation, reason, operands) for each distinct op and operand shapes,
      in the order of tracing. "cuda" ops run their XLA form where the program is compiled for
      another platform.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]

    def call(arrays):
        given = iter(arrays)
        filled = [next(given) if a else x for a, x in zip(is_array, leaves, strict=True)]
        positional, named = jax.tree.unflatten(tree, filled)
        return fn(*positional, **named)

    with _recording() as record:
        jax.make_jaxpr(call)([x for a, x in zip(is_array, leaves, strict=True) if a])
    return tuple(record)
