"""Compiles the programs of a run before they are timed, many at a time.

A run compiles a few hundred programs, seconds each on one core, while the device idles. Here
threads compile the same programs, for operands of the same shapes, into a compilation cache on
disk, where the run finds them. Nothing is timed meanwhile, and XLA tunes one program at a time.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from genie_tk_jax.bench.contestants import Contestant, Trial, trial
from genie_tk_jax.bench.judge import cotangents_of, exact
from genie_tk_jax.bench.timing import UNTUNED
from genie_tk_jax.bench.workloads import Workload, pose

Task = Callable[[], None]


@contextmanager
def cache() -> Iterator[None]:
    """Keeps compiled programs on disk: where JAX is told to, else for as long as the run lasts."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with tempfile.TemporaryDirectory() as folder:
        settings["jax_compilation_cache_dir"] = folder
        before = {name: getattr(jax.config, name) for name in settings}
        _configure(settings)
        try:
            yield
        finally:
            _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else a folder named before stays in use


def compile_all(tasks: list[Task], jobs: int) -> None:
    """Runs the tasks, `jobs` at a time. What fails here fails in the run too, and is told there."""
    with ThreadPoolExecutor(jobs) as threads:
        for _ in threads.map(_attempt, tasks):
            pass


def _attempt(task: Task) -> None:
    try:
        task()
    except Exception:
        return


def truth_task(workload: Workload, which: str, **problem: Any) -> Task:
    """Compiles the float32 truth of a problem; `problem` are the arguments of `pose`."""

    def task():
        with jax.default_matmul_precision("highest"):
            _compile(exact(workload), workload, which, problem, wide=True)

    return task


def contestant_task(
    build: Callable[[], Contestant], workload: Workload, which: str, **problem: Any
) -> Task:
    """Compiles a contestant's step."""

    def task():
        _compile(build(), workload, which, problem, wide=False)

    return task


def _compile(contestant, workload, which, problem, *, wide: bool) -> None:
    found: list[Trial] = []

    def operands(posed):
        if wide:
            posed = posed.widened()
        cotangents = cotangents_of(workload, posed, problem["dtype"])
        found.append(trial(contestant, posed, which, cotangents))
        return found[0].operands

    posed = jax.eval_shape(partial(pose, workload, **problem))
    shapes = jax.eval_shape(operands, posed)
    jax.jit(found[0].step).lower(*shapes).compile(UNTUNED if wide else None)
