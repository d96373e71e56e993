"""Compiles a call, and finds its memory and the time that the device takes for it.

A function is compiled once and warmed up. A sample is many calls that are enqueued one after
another, with a single wait at the end, as many as last 10 ms; the figure is the median of the
samples. The device runs the calls in order, so a sample holds their device time, and what the host
does for a call, 30 to 150 us, hides behind the calls before. It does not hide for the shortest:
those run in a loop of a known length as well, which needs the host once, where each call's operands
pass an optimisation barrier together with a counter that changes with every turn, so that XLA can
neither hoist a call out of the loop nor drop one. Of the two the lower median counts, and the row
says which it is.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SAMPLE_SECONDS = 10e-3
# Calls longer than this hide what the host does for the next one.
HIDES_HOST = 250e-6
TURNS = 64


class Timing(NamedTuple):
    """Milliseconds a call: median, least and most of the samples.

    calls: in each sample. method: "calls" from the host, or a "loop" on the device.
    """

    ms: float
    ms_min: float
    ms_max: float
    samples: int
    calls: int
    method: str


# Tuning a program that is not timed only takes time.
UNTUNED = {"xla_gpu_autotune_level": 0}


def compiled(step: Callable, operands: tuple, options: dict[str, Any] | None = None) -> Any:
    """The compiled `step`; its memory_analysis() is that of one call.

    Args:
      options: of the compiler.

    Raises:
      MemoryError: results and temporaries do not fit in the memory that is left; nothing ran.
    """
    program = jax.jit(step).lower(*operands).compile(options)
    check_memory(program)
    return program


def check_memory(program: Any) -> None:
    """Raises MemoryError if a call's results and temporaries do not fit in what is left."""
    needed, left = _needed(program), _memory_left()
    if needed > left:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB; {left / 2**30:.1f} GiB are left")


def temporary_bytes(program: Any) -> int | None:
    """Temporaries of one call by XLA's analysis; None where the platform has none."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def peak_bytes(program: Any) -> int | None:
    """Arguments, results and temporaries of one call by XLA's analysis; None where it has none."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    arguments = analysis.argument_size_in_bytes - analysis.alias_size_in_bytes
    return arguments + _needed(program)


def _needed(program: Any) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        return 0
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _memory_left() -> int:
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "bytes_limit" in statistics_of_device:
        return statistics_of_device["bytes_limit"] - statistics_of_device["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def timed(program: Callable, step: Callable, operands: tuple, repeats: int) -> Timing:
    """Times `step`, of which `program` is the compiled form and has run before."""
    found = _samples(lambda: program(*operands), 1, repeats, "calls")
    if found.ms > 1e3 * HIDES_HOST:
        return found
    call = jax.jit(step)  # dispatches faster than a compiled program
    loop = jax.jit(looped(step, TURNS))
    return min(
        _samples(lambda: call(*operands), 1, repeats, "calls"),
        _samples(lambda: loop(*operands), TURNS, repeats, "loop"),
    )


def looped(step: Callable, turns: int) -> Callable:
    """`step`, `turns` times one after the other; returns the last results."""

    def run(*operands):
        def turn(_, carry):
            count, _ = carry
            held, count = jax.lax.optimization_barrier((operands, count))
            return count + 1, step(*held)

        shapes = jax.eval_shape(step, *operands)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, turns, turn, (jnp.int32(0), empty))

    return run


def _samples(run: Callable[[], Any], calls_of_run: int, repeats: int, method: str) -> Timing:
    """Times samples of as many runs as last SAMPLE_SECONDS, `calls_of_run` calls in each."""
    jax.block_until_ready(run())
    runs = 1
    while (seconds := _seconds(run, runs)) < SAMPLE_SECONDS:
        runs = max(2 * runs, math.ceil(runs * SAMPLE_SECONDS / max(seconds, 1e-6)))
    calls = runs * calls_of_run
    found = [1e3 * _seconds(run, runs) / calls for _ in range(repeats)]
    return Timing(statistics.median(found), min(found), max(found), repeats, calls, method)


def _seconds(run: Callable[[], Any], times: int) -> float:
    """From the first call to the end of the last."""
    started, result = time.perf_counter(), None
    for _ in range(times):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - started
