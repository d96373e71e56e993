"""Runs the pair stack; checks every layer against float32 and times the last block's layers."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genie_tk_jax import explain
from genie_tk_jax.demo.stack import BLOCK, Layer

# The most that rounding explains, as a share of the norm of a layer's update.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


class Choice(NamedTuple):
    """What runs a layer, and why; a layer of several ops names each distinct answer once."""

    implementation: str
    reason: str


class Measurement(NamedTuple):
    """What was found out about one layer of the stack.

    error: distance from the reference over the norm of the reference, the largest of all blocks.
    milliseconds, reference_milliseconds: median time of a call in the last block.
    """

    layer: str
    error: float
    milliseconds: float
    reference_milliseconds: float


def init_stack(key: jax.Array, blocks: int) -> list[list[Any]]:
    """Parameters of every layer of every block, float32, all drawn from `key`."""
    inits = [jax.jit(layer.init) for layer in BLOCK]
    keys = jax.random.split(key, (blocks, len(BLOCK)))
    return [[init(k) for init, k in zip(inits, row, strict=True)] for row in keys]


def explain_block(
    z: jax.Array, mask: jax.Array, block: Sequence[Any], implementation: str | None
) -> list[Choice]:
    """What runs each layer of a block on these arguments, and why.

    Raises:
      NotImplementedError: `implementation` cannot serve these arguments; says why.
    """
    choices = []
    with jax.default_matmul_precision(_precision(z.dtype)):
        for layer, params in zip(BLOCK, block, strict=True):
            apply = partial(layer.apply, implementation=implementation)
            choices.append(_in_one(explain(apply, z, mask, params)))
    return choices


def run_stack(
    z: jax.Array,
    mask: jax.Array,
    stack: Sequence[Sequence[Any]],
    *,
    implementation: str | None,
    repeats: int,
    progress: Callable[[int, str], None],
) -> tuple[jax.Array, list[Measurement]]:
    """z [N, N, C] after every block of `stack`, in its own dtype, and one measurement a layer.

    Each layer is compiled once for all blocks. Its reference is the XLA implementation in float32
    on the same input and weights. Both give the update alone: the residual would hide the error.

    progress: told, before each layer runs, how many have run and its name.
    """
    runs = [_compiled(layer, implementation, _precision(z.dtype)) for layer in BLOCK]
    references = [_compiled(layer, "xla", "highest") for layer in BLOCK]
    errors, times = [], []
    for block in stack:
        for layer, run, reference, params in zip(BLOCK, runs, references, block, strict=True):
            progress(len(errors), layer.name)
            exact = z.astype(jnp.float32)
            update = run(z, mask, params)
            errors.append(float(_error(update, reference(exact, mask, params))))
            if block is stack[-1]:
                milliseconds = _median(repeats, run, z, mask, params)
                times.append((milliseconds, _median(repeats, reference, exact, mask, params)))
            z = z + update
    worst = np.reshape(errors, (len(stack), len(BLOCK))).max(axis=0).tolist()
    found = zip(BLOCK, worst, times, strict=True)
    return z, [Measurement(layer.name, error, *took) for layer, error, took in found]


def _in_one(choices: Sequence[Any]) -> Choice:
    if not choices:
        return Choice("xla", "plain JAX, not one of the library's layers")
    implementations = dict.fromkeys(choice.implementation for choice in choices)
    reasons = dict.fromkeys(choice.reason for choice in choices)
    return Choice(", ".join(implementations), "; ".join(reasons))


def _precision(dtype: Any) -> str | None:
    """float32 is asked for to be exact, which on a GPU JAX's default is not; else the default."""
    return "highest" if dtype == jnp.float32 else None


def _compiled(layer: Layer, implementation: str | None, precision: str | None):
    apply = jax.jit(partial(layer.apply, implementation=implementation))

    def call(z, mask, params):
        with jax.default_matmul_precision(precision):
            return apply(z, mask, params)

    return call


@jax.jit
def _error(update: jax.Array, exact: jax.Array) -> jax.Array:
    distance = jnp.linalg.norm((update.astype(jnp.float32) - exact).ravel())
    return distance / jnp.linalg.norm(exact.ravel())


def _median(repeats: int, call: Callable[..., jax.Array], *arguments) -> float:
    """Milliseconds from the call to its result, once compiled."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
