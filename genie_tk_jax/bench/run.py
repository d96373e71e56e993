"""Runs the benchmark: a row for every contestant on every problem, written as soon as it is known.

The JSON file `results.json`, schema 1:

    schema        1
    date          when the run began, ISO 8601, UTC
    command       the command line
    device        JAX's name of the device, its driver and how many there are
    versions      of this library, Python, jax, jaxlib and every peer that is installed
    kernels       whether our kernel library is there, or why not
    ceiling       bytes_per_second, flops_per_second of this device, or null if not known
    options       of the command, defaults included
    rows          one for each workload, pass, size, dtype and contestant:
      workload, kind, pass, dtype, n, channels, heads, masked, contestant
      status, reason          see judge.Verdict
      error, gradient_error   ||out - truth|| / ||truth||, truth being float32
      ms, ms_min, ms_max, samples, calls, method   see timing.Timing
      temporary_bytes         of one call, by XLA's analysis
      flops, bytes            counted, see costs.py; for all contestants alike
      flops_share, bytes_share   of the ceilings, if they are known
      ran                     for this library: op, implementation, reason, operands of each op

What was not measured is null. Sizes are in ascending order, and within a size every workload has
all its contestants before the next begins: a run that is cut short leaves whole comparisons.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax.bench import ahead
from genie_tk_jax.bench.contestants import LIBRARY, PLAIN, REFERENCE, own
from genie_tk_jax.bench.costs import CEILINGS, Sizes, counted
from genie_tk_jax.bench.judge import Verdict, failure, judge, truth_of
from genie_tk_jax.bench.machine import device, kernels, versions
from genie_tk_jax.bench.peers import PEERS
from genie_tk_jax.bench.workloads import WORKLOADS, Workload, pose

SCHEMA = 1
# The share of the ceiling that no call reaches, with leave for a card that is a little faster.
IMPOSSIBLE = 1.1
MEASURED = (
    *("error", "gradient_error", "ms", "ms_min", "ms_max", "samples", "calls", "method"),
    *("temporary_bytes", "ran"),
)
Row = dict[str, Any]


class Options(NamedTuple):
    """What to run; the command's options by their names."""

    workloads: tuple[str, ...]
    passes: tuple[str, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    channels: int
    heads: int
    peers: tuple[str, ...]
    repeats: int
    masked: float
    jobs: int


def bench(options: Options, out: Path, arguments: list[str], tell: Callable[[Row], None]) -> dict:
    """Runs all that `options` name and writes `results.json` in `out` after each row.

    Args:
      arguments: of the command, for the report.
      tell: called with each row.
    """
    report = _report(options, arguments)
    with ahead.cache():
        for n in sorted(options.sizes):
            of_size = options._replace(sizes=(n,))
            if options.jobs > 1:
                ahead.compile_all(list(_tasks(of_size)), options.jobs)
            for row in _rows(of_size):
                report["rows"].append(row)
                write(out / "results.json", report)
                tell(row)
    return report


def _report(options: Options, arguments: list[str]) -> dict[str, Any]:
    found = device()
    ceiling = CEILINGS.get(found["name"])
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "genie_tk_jax", *arguments]),
        "device": found,
        "versions": versions({package for peer in PEERS.values() for package in peer.packages}),
        "kernels": kernels(),
        "ceiling": ceiling and ceiling._asdict(),
        "options": options._asdict(),
        "rows": [],
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file at once, so that it is whole whenever a run is stopped."""
    partial_path = path.with_suffix(".part")
    text = json.dumps(report, indent=1, allow_nan=False)
    partial_path.write_text(text + "\n", encoding="utf-8")
    partial_path.replace(path)


def _problems(options: Options) -> Iterator[tuple[Workload, Sizes, str, list[str]]]:
    """Workloads, sizes, dtypes and passes in the order of the run."""
    for n in options.sizes:
        sizes = Sizes(n, options.channels, options.heads)
        for dtype in options.dtypes:
            for workload in (WORKLOADS[name] for name in options.workloads):
                passes = [which for which in workload.passes if which in options.passes]
                if passes:
                    yield workload, sizes, dtype, passes


def _tasks(options: Options) -> Iterator[ahead.Task]:
    for workload, sizes, dtype, passes in _problems(options):
        problem = dict(sizes=sizes, dtype=dtype, masked=options.masked)
        yield ahead.truth_task(workload, passes[-1], **problem)
        for which in passes:
            for _, build in _contestants(options, workload, sizes, dtype):
                yield ahead.contestant_task(build, workload, which, **problem)


def _rows(options: Options) -> Iterator[Row]:
    for workload, sizes, dtype, passes in _problems(options):
        yield from _of_workload(options, workload, sizes, dtype, passes)


def _of_workload(
    options: Options, workload: Workload, sizes: Sizes, dtype: str, passes: list[str]
) -> Iterator[Row]:
    try:
        problem = pose(workload, sizes, dtype, options.masked)
        # What the last pass needs holds what those before it do.
        truth = truth_of(workload, problem, passes[-1], dtype)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        status, reason = failure(error)
        verdict = Verdict(status, f"nothing to judge by in float32: {reason}", {})
        for which in passes:
            yield _row(options, workload, sizes, dtype, which, LIBRARY, verdict)
        return
    for which in passes:
        yardstick = None
        for name, build in _contestants(options, workload, sizes, dtype):
            verdict = judge(
                build, problem, which, truth, yardstick=yardstick, repeats=options.repeats
            )
            if name in (PLAIN, REFERENCE) and yardstick is None and verdict.status == "ok":
                errors = (verdict.fields.get(key) for key in ("error", "gradient_error"))
                yardstick = [error for error in errors if error is not None]
            yield _row(options, workload, sizes, dtype, which, name, verdict)


def _contestants(options: Options, workload: Workload, sizes: Sizes, dtype: str):
    """Names and builders, the yardstick first."""
    for contestant in own(workload):
        yield contestant.name, partial(_given, contestant)
    for name in options.peers:
        if workload.kind in PEERS[name].kinds:
            yield name, partial(PEERS[name].build, name, workload, sizes, dtype)


def _given(contestant):
    return contestant


def _row(options, workload, sizes, dtype, which, name, verdict: Verdict) -> Row:
    flops, moved = counted(workload.kind, sizes, which, jnp.dtype(dtype).itemsize)
    verdict, shares = _against_ceiling(verdict, flops, moved)
    measured = {**dict.fromkeys(MEASURED), **verdict.fields}
    return {
        "workload": workload.name,
        "kind": workload.kind,
        "pass": which,
        "dtype": dtype,
        **sizes._asdict(),
        "masked": options.masked,
        "contestant": name,
        "status": verdict.status,
        "reason": verdict.reason,
        **{key: finite(value) for key, value in measured.items()},
        "flops": flops,
        "bytes": moved,
        **shares,
    }


def _against_ceiling(verdict: Verdict, flops: float, moved: float):
    """The verdict, and the shares of the device's ceilings that the call reached.

    What seems to be faster than the device was not run: the verdict on it is "wrong".
    """
    ceiling, ms = CEILINGS.get(jax.devices()[0].device_kind), verdict.fields.get("ms")
    shares: dict[str, float | None] = {"flops_share": None, "bytes_share": None}
    if ceiling is None or ms is None:
        return verdict, shares
    shares["flops_share"] = flops / (1e-3 * ms * ceiling.flops_per_second)
    shares["bytes_share"] = moved / (1e-3 * ms * ceiling.bytes_per_second)
    if shares["flops_share"] <= IMPOSSIBLE:
        return verdict, shares
    reason = f"{ms:.3g} ms is faster than the device can be: the timing is at fault"
    return Verdict("wrong", reason, {**verdict.fields, "ms": None}), shares


def finite(value: Any) -> Any:
    """JSON has no NaN: the error of results that hold one is null."""
    return None if isinstance(value, float) and not jnp.isfinite(value) else value


def failed(rows: list[Row]) -> list[Row]:
    """The rows of this library that are anything but "ok"."""
    return [row for row in rows if row["contestant"] == LIBRARY and row["status"] != "ok"]
