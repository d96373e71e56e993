"""The demo from a protein to a table, two plots and a JSON file."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from genie_tk_jax.demo import measure, pair, plots
from genie_tk_jax.demo.environment import environment
from genie_tk_jax.demo.proteins import InputError, Protein
from genie_tk_jax.demo.stack import BLOCK, C_Z

# One layer of the table: the fields of measure.Choice and measure.Measurement, and "passed".
Row = dict[str, Any]


def demo(
    protein: Protein,
    *,
    blocks: int,
    dtype: str,
    implementation: str | None,
    seed: int,
    repeats: int,
    out: Path,
) -> bool:
    """Runs the stack on `protein`, prints a table, writes plots and demo.json to `out`.

    Returns:
      Whether every layer is as near to its float32 reference as `dtype` allows.

    Raises:
      InputError: `out` cannot be written, or `implementation` cannot serve these arguments.
    """
    started = time.perf_counter()
    console, size = Console(), len(protein.residue_types)
    console.print(f"{escape(protein.name)}: {size} residues, {dtype}, depth {blocks}")
    embed_key, stack_key = jax.random.split(jax.random.key(seed))
    before = pair.embed(protein, embed_key, C_Z).astype(dtype)
    stack = measure.init_stack(stack_key, blocks)
    choices = _explain(before, stack[0], implementation)
    _make_folder(out)
    after, found = _run(console, before, stack, implementation, repeats)
    rows = [_row(*both, dtype) for both in zip(choices, found, strict=True)]
    _print_rows(console, rows, dtype)
    options = {"blocks": blocks, "dtype": dtype, "implementation": implementation, "seed": seed}
    _draw(out, protein, (before, after), rows, dtype)
    seconds = time.perf_counter() - started
    _write(out / "demo.json", protein, {**options, "repeats": repeats}, rows, seconds)
    console.print(f"Plots and figures in {escape(str(out))}, {seconds:.0f} s in all.")
    return all(row["passed"] for row in rows)


def _mask(z: jax.Array) -> jax.Array:
    """All pairs valid: a lone protein needs no padding."""
    return jnp.ones(z.shape[:2], bool)


def _explain(z: jax.Array, block: list[Any], implementation: str | None) -> list[measure.Choice]:
    try:
        return measure.explain_block(z, _mask(z), block, implementation)
    except NotImplementedError as error:
        raise InputError(f"--implementation {implementation}: {error}") from error


def _make_folder(out: Path) -> None:
    """Makes `out` and tries to write there, before minutes go into what belongs in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def _run(
    console: Console,
    z: jax.Array,
    stack: list[list[Any]],
    implementation: str | None,
    repeats: int,
) -> tuple[jax.Array, list[measure.Measurement]]:
    """`measure.run_stack` under a bar that names the layer at work."""
    total = len(stack) * len(BLOCK)
    with Progress(console=console) as bar:
        task = bar.add_task("", total=total)

        def progress(done: int, name: str) -> None:
            bar.update(task, completed=done, description=f"{name:<24}")

        result = measure.run_stack(
            z, _mask(z), stack, implementation=implementation, repeats=repeats, progress=progress
        )
        progress(total, "done")
    return result


def _row(choice: measure.Choice, found: measure.Measurement, dtype: str) -> Row:
    passed = found.error <= measure.TOLERANCES[dtype]
    return {**found._asdict(), **choice._asdict(), "passed": passed}


def _print_rows(console: Console, rows: list[Row], dtype: str) -> None:
    """One line a layer; below, each reason once, as they repeat and are longer than a column."""
    reasons = list(dict.fromkeys(row["reason"] for row in rows))
    table = Table()
    for column in ("layer", "runs on"):
        table.add_column(column)
    for column in ("median ms", "float32\nreference ms", "error", ""):
        table.add_column(column, justify="right")
    for row in rows:
        where = f"{escape(row['implementation'])} ({reasons.index(row['reason']) + 1})"
        times = f"{row['milliseconds']:.2f}", f"{row['reference_milliseconds']:.2f}"
        verdict = "[green]ok[/]" if row["passed"] else "[bold red]FAIL[/]"
        table.add_row(row["layer"], where, *times, f"{row['error']:.1e}", verdict)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {escape(reason)}")
    limit = measure.TOLERANCES[dtype]
    console.print(f"Errors are relative to float32; {dtype} may be {limit:.0e} off.")


def _write(
    path: Path, protein: Protein, options: dict[str, Any], rows: list[Row], seconds: float
) -> None:
    """Writes JSON, which has no NaN: the error of an update that holds one becomes null."""
    finite = [row["error"] if math.isfinite(row["error"]) else None for row in rows]
    report = {
        "protein": {"name": protein.name, "residues": len(protein.residue_types)},
        "options": options,
        "tolerance": measure.TOLERANCES[options["dtype"]],
        "layers": [{**row, "error": error} for row, error in zip(rows, finite, strict=True)],
        "environment": environment(),
        "seconds": seconds,
    }
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _draw(
    out: Path, protein: Protein, maps: tuple[jax.Array, jax.Array], rows: list[Row], dtype: str
) -> None:
    name = protein.name if len(protein.name) <= 60 else protein.name[:59] + "…"
    distance = None if protein.c_beta is None else pair.distances(protein.c_beta)
    before, after = (np.asarray(z, np.float32) for z in maps)
    title = f"Pair representation of {name}"
    plots.pair_before_after(out / "pair_before_after.png", title, before, after, distance)
    title = f"{name}, {len(before)} residues\n{environment()['devices']}"
    plots.time_per_layer(out / "time_per_layer.png", title, rows, dtype)
