"""ColabFold's AlphaFold with and without the swap: time, memory, and the longest design that fits.

The JSON file `alphafold.json`, schema 1, kind "alphafold", has date, command, device, versions,
kernels and options as `run` says, XLA_FLAGS as they were set, and

    rows       one for each size, depth, pass and contestant of trunk.VARIANTS:
      n, blocks, msa, dtype, pass, contestant
      status, reason          "ok", "wrong", "missing", "refused", "out of memory" or "skipped"
      error, gradient_error   ||out - truth|| / ||truth||, truth being the host in float32; at the
                              smallest size alone
      ms, ms_min, ms_max, samples, calls, method   see timing.Timing
      temporary_bytes, peak_bytes   of one call, by XLA's analysis; the peak has arguments and
                              results in it
      trace_seconds, compile_seconds   while other programs compile beside it
      ran                     op, implementation, reason, operands of each op of the swapped
                              contestant; of the shallowest trunk, forward and backward
    longest    what design.py finds

The pass "fwd+bwd" is what design takes: gradients of the msa and pair activations, while the
parameters are held.
"""

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax

from genie_tk_jax import explain
from genie_tk_jax.bench import design, judge, machine, timing, trunk
from genie_tk_jax.bench.costs import PASSES
from genie_tk_jax.bench.run import SCHEMA, finite, write

FILE = "alphafold.json"
MEASURED = (
    *("error", "gradient_error", "ms", "ms_min", "ms_max", "samples", "calls", "method"),
    *("temporary_bytes", "peak_bytes", "trace_seconds", "compile_seconds", "ran"),
)
Row = dict[str, Any]


class Options(NamedTuple):
    """What to run; the command's options by their names.

    blocks: depths of the trunk.
    seconds: after these nothing more is begun.
    design_blocks, design_msa: of the search for the longest design; without blocks there is none.
    memory: GiB that a design may take; None for all that JAX may use on this device.
    """

    contestants: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    msa: int
    dtype: str
    repeats: int
    masked: float
    seconds: float
    design_blocks: int
    design_msa: int
    memory: float | None


class Compiled(NamedTuple):
    """A program, and how long it took to trace and to compile."""

    program: Any
    trace_seconds: float
    compile_seconds: float


class Compiler:
    """Traces in the calling thread and compiles in others, as long as there is time."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2))

    def start(self, name: str, dtype: str, which: str, shapes: trunk.Problem, **options) -> Future:
        """A step of the trunk, compiled; what tracing or compiling raises is the future's."""
        future: Future = Future()
        started = time.monotonic()
        try:
            self.check()
            lowered = jax.jit(trunk.step(name, dtype, which)).lower(*shapes)
        except Exception as error:
            future.set_exception(error)
            return future
        traced = time.monotonic()

        def compile():
            begun = time.monotonic()
            program = lowered.compile(options or None)
            return Compiled(program, traced - started, time.monotonic() - begun)

        return self.pool.submit(compile)

    def check(self) -> None:
        """Raises TimeoutError when the time is up."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time that the run was given is spent")

    def finish(self, future: Future) -> Compiled:
        """What `start` began; TimeoutError if it has not come when the time is up."""
        return future.result(max(0.0, self.deadline - time.monotonic()))


def bench(options: Options, out: Path, arguments: list[str], tell: Callable[[str, Row], None]):
    """Runs all that `options` name and writes `alphafold.json` in `out` after each row.

    Args:
      arguments: of the command, for the report.
      tell: called with "rows" or "longest" and each row of it.

    Raises:
      ImportError: ColabFold's AlphaFold is not installed.
    """
    report = {
        "schema": SCHEMA,
        "kind": "alphafold",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "genie_tk_jax", *arguments]),
        "device": machine.device(),
        "versions": machine.versions(trunk.PACKAGES),
        "kernels": machine.kernels(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "options": options._asdict(),
        "rows": [],
        "longest": [],
    }
    compiler = Compiler(options.seconds)
    parts = {"rows": _rows(options, compiler), "longest": design.longest(options, compiler)}
    for part, found in parts.items():
        for row in found:
            report[part].append(row)
            write(out / FILE, report)
            tell(part, row)
    compiler.pool.shutdown(wait=False, cancel_futures=True)
    return report


def _rows(options: Options, compiler: Compiler) -> Iterator[Row]:
    for n in sorted(options.sizes):
        # All of a size is compiled before any of it is timed: both keep the GPU busy.
        programs, truths = _programs(options, compiler, n)
        for blocks in sorted(options.blocks):
            shapes = trunk.shapes(blocks, n, options.msa, options.dtype)
            judged = _Judged(options, compiler, trunk.pose(shapes, options.masked))
            judged.learn(truths.get(blocks))
            for (depth, name, which), program in programs.items():
                if depth == blocks:
                    yield judged.row(name, which, program)


def _programs(options: Options, compiler: Compiler, n: int) -> tuple[dict, dict]:
    """By depth, contestant and pass; and of the smallest size, by depth, those that judge them."""
    programs, truths = {}, {}
    for blocks in sorted(options.blocks):
        shapes = trunk.shapes(blocks, n, options.msa, options.dtype)
        for name in options.contestants:
            for which in passes(name):
                future = compiler.start(name, options.dtype, which, shapes)
                programs[blocks, name, which] = future
        if n == min(options.sizes):
            shapes = trunk.shapes(blocks, n, options.msa, "float32")
            with jax.default_matmul_precision("highest"):
                truths[blocks] = compiler.start(
                    trunk.UNCHUNKED, "float32", PASSES[-1], shapes, **timing.UNTUNED
                )
    return programs, truths


def passes(name: str) -> tuple[str, ...]:
    """Those of a contestant. Nobody differentiates through chunks, which would keep all logits."""
    return PASSES[:1] if trunk.VARIANTS[name].chunked else PASSES


class _Judged:
    """The contestants on one problem: first the truth is learned, then each becomes a row."""

    def __init__(self, options: Options, compiler: Compiler, problem: trunk.Problem):
        self.options, self.compiler, self.problem = options, compiler, problem
        self.truth: Any = None
        self.yardsticks: dict[str, list[float]] = {}

    def learn(self, program: Future | None) -> None:
        """Runs the program that judges the others; where it does not run nothing is judged."""
        if program is None:
            return
        wide = [x.astype("float32") for x in (self.problem.msa, self.problem.z)]
        with contextlib.suppress(Exception):
            compiled = self.compiler.finish(program).program
            timing.check_memory(compiled)
            self.truth = compiled(self.problem.params, *wide, self.problem.valid)

    def row(self, name: str, which: str, program: Future) -> Row:
        problem = self.problem
        about = {"n": problem.z.shape[0], "blocks": trunk.depth(problem)}
        about |= {"msa": problem.msa.shape[0], "dtype": self.options.dtype}
        about |= {"pass": which, "contestant": name}
        found: dict[str, Any] = dict.fromkeys(MEASURED)
        # A contestant may raise whatever it likes, and none of it may end the run.
        try:
            status, reason = self._measure(name, which, program, found)
        except TimeoutError as error:
            status, reason = "skipped", str(error) or "the time that the run was given is spent"
        except Exception as error:
            status, reason = judge.failure(error)
        found = {key: finite(value) for key, value in found.items()}
        return about | {"status": status, "reason": reason} | found

    def _measure(self, name: str, which: str, program: Future, found: Row) -> tuple[str, str]:
        """Status and reason; what is known goes to `found` at once."""
        compiled, *seconds = self.compiler.finish(program)
        found |= zip(("trace_seconds", "compile_seconds"), seconds, strict=True)
        found["temporary_bytes"] = timing.temporary_bytes(compiled)
        found["peak_bytes"] = timing.peak_bytes(compiled)
        timing.check_memory(compiled)
        self.compiler.check()
        step = trunk.step(name, self.options.dtype, which)
        if self.truth is not None:
            results = compiled(*self.problem)
            pairs = zip(results, self.truth, strict=False)
            errors = [float(judge.distance(x, y)) for x, y in pairs]
            found |= zip(("error", "gradient_error"), errors, strict=False)
            if reason := judge.too_far(errors, self.yardsticks.setdefault(which, errors)):
                return "wrong", reason
        shallowest = trunk.depth(self.problem) == min(self.options.blocks)
        if trunk.VARIANTS[name].swap and which == PASSES[-1] and shallowest:
            found["ran"] = [choice._asdict() for choice in explain(step, *self.problem)]
        found |= timing.timed(compiled, step, self.problem, self.options.repeats)._asdict()
        return "ok", ""
