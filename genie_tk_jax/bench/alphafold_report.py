"""Results of the benchmark of AlphaFold in words: a line as a row comes in, the README's tables."""

from collections.abc import Sequence
from typing import Any

from genie_tk_jax.bench import report
from genie_tk_jax.bench.trunk import GENIE, KERNELS, STOCK, UNCHUNKED

Row = dict[str, Any]
HEADER = (
    f"{'blocks':>6} {'n':>5} {'pass':<8} {'contestant':<18} {'ms':>9} {'spread':>7} "
    f"{'peak GiB':>9} {'error':>8} {'compiled':>8}"
)
COLUMNS = ("blocks", "pass", "N", "without", "with", "speed-up", KERNELS)
PROBLEM = ("msa", "dtype", "blocks", "pass", "n")


def line(part: str, row: Row) -> str:
    """One row of "rows" or "longest" at a fixed width."""
    if part == "longest":
        return f"{row['contestant']}: {_longest(row)}"
    start = f"{row['blocks']:>6} {row['n']:>5} {row['pass']:<8} {row['contestant']:<18} "
    memory = f"{_gibibytes(row['peak_bytes']):>9}"
    if row["ms"] is None:
        return f"{start}{row['status']}: {row['reason']} ({memory.strip()} GiB)"
    spread = (row["ms_max"] - row["ms_min"]) / row["ms"]
    errors = [error for error in (row["error"], row["gradient_error"]) if error is not None]
    error = f"{max(errors):>8.1e}" if errors else f"{report.NOTHING:>8}"
    ran = f"  {report.kernels_ran(row)} kernels" if row["ran"] else ""
    took = f"{row['compile_seconds']:>6.1f} s"
    return f"{start}{row['ms']:>9.4g} {spread:>7.0%} {memory} {error} {took}{ran}"


def markdown(found: dict[str, Any]) -> str:
    """The README's tables of one report."""
    options = found["options"]
    parts = [report.title(found) + ".", ""]
    if found["rows"]:
        parts += [f"MSA of {options['msa']}, {options['dtype']}; medians, and peak memory.", ""]
        parts += [report.cells(COLUMNS), report.cells(["---"] * len(COLUMNS))]
        problems = report.grouped(found["rows"], PROBLEM)
        for _, rows in sorted(problems.items(), key=lambda item: item[0]):
            parts.append(report.cells(compared(rows)))
        parts.append("")
    if found["longest"]:
        names = {UNCHUNKED: "without the swap", GENIE: "with it"}
        first = found["longest"][0]
        parts += [f"Longest design through {first['blocks']} blocks, MSA of {first['msa']}:", ""]
        parts += [
            f"- {names.get(row['contestant'], row['contestant'])}: {_longest(row)}"
            for row in found["longest"]
        ]
    return "\n".join(parts).rstrip()


def compared(rows: Sequence[Row]) -> list[str]:
    """The cells of one problem. Without the swap stands the faster of chunked and not chunked."""
    by_name = {row["contestant"]: row for row in rows}
    stock = [by_name[name] for name in (STOCK, UNCHUNKED) if name in by_name]
    without = min(stock, key=lambda row: row["ms"] or float("inf"), default=None)
    ours = by_name.get(GENIE)
    times = [row["ms"] for row in (without, ours) if row and row["ms"]]
    first = rows[0]
    return [
        *(str(first["blocks"]), first["pass"], str(first["n"])),
        *(_cell(without), _cell(ours)),
        f"{times[0] / times[1]:.2f}" if len(times) == 2 else report.NOTHING,
        _cell(by_name.get(KERNELS)),
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return report.NOTHING
    time = row["status"] if row["ms"] is None else f"{row['ms']:.3g} ms"
    return time if row["peak_bytes"] is None else f"{time}, {_gibibytes(row['peak_bytes'])} GiB"


def _longest(row: Row) -> str:
    if row["n"] is None:
        return f"none found; {row['reason']}".rstrip("; ")
    limit = f"{_gibibytes(row['peak_bytes'])} of {_gibibytes(row['limit_bytes'])} GiB"
    least = "at least " if row["status"] == "at least" else ""
    more = f"; {row['next_n']} takes {_gibibytes(row['next_bytes'])}" if row["next_n"] else ""
    return f"{least}{row['n']} residues, {limit}{more}"


def _gibibytes(size: int | None) -> str:
    return report.NOTHING if size is None else f"{size / 2**30:.3g}"
