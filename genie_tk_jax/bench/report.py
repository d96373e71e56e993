"""Results in words: a line as a row comes in, the table at the end, the README's table."""

from collections.abc import Iterable, Sequence
from typing import Any

from genie_tk_jax.bench.contestants import LIBRARY, PLAIN, REFERENCE

Row = dict[str, Any]
# What has to agree for rows to be set against one another.
GROUP = ("device", "dtype", "channels", "heads", "masked")
PROBLEM = (*GROUP, "workload", "pass", "n")

HEADER = (
    f"{'workload':<24} {'pass':<8} {'n':>5} {'contestant':<15} {'ms':>9} {'spread':>7} "
    f"{'TFLOP/s':>8} {'GB/s':>7} {'share':>6} {'temp MiB':>9} {'error':>8}"
)
COLUMNS = (
    *("workload", "pass", "N", "ms", "kernels", "of ceiling", "XLA ms", "best other ms"),
    *("speed-up", "temp MiB", "leanest other", "error / XLA's"),
)
BRIEF = ("workload", "pass", "N", "ms", "best other ms", "speed-up", "temp MiB", "leanest other")
# Where the output is no terminal, which has a width of its own.
WIDTH = 160
NOTHING = "–"


def merged(reports: Iterable[dict[str, Any]]) -> list[Row]:
    """The rows of all reports, each with its report's device and ceiling; newer ones replace."""
    found: dict[tuple, Row] = {}
    for report in sorted(reports, key=lambda report: report["date"]):
        about = {"device": report["device"]["name"], "ceiling": report["ceiling"]}
        for row in report["rows"]:
            row = about | row
            key = tuple(row[name] for name in (*PROBLEM, "contestant"))
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple, list[Row]]:
    """Rows by their values of `names`, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def line(row: Row) -> str:
    """One row at a fixed width."""
    start = f"{row['workload']:<24} {row['pass']:<8} {row['n']:>5} {row['contestant']:<15} "
    if row["ms"] is None:
        return f"{start}{row['status']}: {row['reason']}"
    error = max(row["error"], row["gradient_error"] or 0)
    spread = (row["ms_max"] - row["ms_min"]) / row["ms"]
    rates = f"{row['flops'] / row['ms'] / 1e9:>8.3g} {row['bytes'] / row['ms'] / 1e6:>7.0f}"
    rates += f" {_share(row):>6}"
    memory = _mebibytes(row["temporary_bytes"])
    ran = f"  {kernels_ran(row)}" if row["ran"] else ""
    return f"{start}{row['ms']:>9.4g} {spread:>7.0%} {rates} {memory:>9} {error:>8.1e}{ran}"


def show(report: dict[str, Any]) -> None:
    """Prints the comparison of one report, with rich where it is installed."""
    lines = [compared(rows) for rows in grouped(merged([report]), PROBLEM).values()]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
        for row in (COLUMNS, *lines):
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    table = Table(title=title(report))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("workload", "pass") else "right")
    for row in lines:
        table.add_row(*row)
    console.print(table)


def markdown(
    reports: Sequence[dict[str, Any]],
    sizes: Sequence[int] | None = None,
    columns: Sequence[str] = COLUMNS,
) -> str:
    """A table for each device, dtype and model size, a line for each problem of these sizes."""
    places = [COLUMNS.index(name) for name in columns]
    parts = []
    for group, rows in grouped(merged(reports), GROUP).items():
        about = dict(zip(GROUP, group, strict=True))
        ran = [report for report in reports if report["device"]["name"] == about["device"]]
        parts += [*dict.fromkeys(title(report) + "." for report in ran), ""]
        share = f"{about['masked']:.0%} of the pairs masked"
        widths = f"{about['channels']} channels, {about['heads']} heads"
        parts += [f"{about['dtype']}, {widths}, {share}; medians.", ""]
        parts += [cells(columns), cells(["---"] * len(columns))]
        problems = grouped(rows, ("workload", "pass", "n"))
        for (*_, n), some in sorted(problems.items(), key=_place(rows)):
            if sizes is None or n in sizes:
                line = compared(some)
                parts.append(cells(line[place] for place in places))
        parts.append("")
    return "\n".join(parts).rstrip()


def _place(rows: Sequence[Row]):
    """Sorts problems by workload and pass, as they first appear, then by size."""
    order = list(grouped(rows, ("workload", "pass")))
    workloads = list(dict.fromkeys(workload for workload, _ in order))
    return lambda item: (workloads.index(item[0][0]), order.index(item[0][:2]), item[0][2])


def compared(rows: Sequence[Row]) -> list[str]:
    """The cells of one problem: this library against the best and the leanest of the others."""
    by_name = {row["contestant"]: row for row in rows}
    ours, plain = by_name.get(LIBRARY), by_name.get(PLAIN)
    first = rows[0]
    others = [row for row in rows if row["contestant"] not in (LIBRARY, REFERENCE) and row["ms"]]
    best = min(others, key=lambda row: row["ms"], default=None)
    counted = [row for row in others if row["temporary_bytes"] is not None]
    leanest = min(counted, key=lambda row: row["temporary_bytes"], default=None)
    return [
        *(first["workload"], first["pass"], str(first["n"])),
        _milliseconds(ours),
        kernels_ran(ours) if ours else NOTHING,
        _share(ours) if ours else NOTHING,
        _milliseconds(plain),
        f"{_milliseconds(best)} {best['contestant']}" if best else NOTHING,
        f"{best['ms'] / ours['ms']:.2f}" if ours and ours["ms"] and best else NOTHING,
        _mebibytes(ours["temporary_bytes"]) if ours else NOTHING,
        f"{_mebibytes(leanest['temporary_bytes'])} {leanest['contestant']}" if leanest else NOTHING,
        _relative_error(ours, plain or by_name.get(REFERENCE)),
    ]


def _relative_error(ours: Row | None, plain: Row | None) -> str:
    """Of the outputs and of the gradients, whichever compares worse."""
    if ours is None or plain is None:
        return NOTHING
    pairs = [(ours[key], plain[key]) for key in ("error", "gradient_error")]
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
    return f"{max(ratios):.2f}" if ratios else NOTHING


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return row["status"] if row["ms"] is None else f"{row['ms']:.3g}"


def _share(row: Row) -> str:
    """Of the nearer of the device's two ceilings."""
    if row["ms"] is None or row["flops_share"] is None:
        return NOTHING
    return f"{max(row['flops_share'], row['bytes_share']):.0%}"


def _mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**20:.1f}"


def kernels_ran(row: Row) -> str:
    """How many of the ops that ran are our kernels; on the CPU none is, whatever was chosen."""
    ran = row["ran"] or ()
    return f"{sum(op['implementation'] == 'cuda' for op in ran)} of {len(ran)}" if ran else NOTHING


def title(report: dict[str, Any]) -> str:
    driver = report["device"]["driver"]
    name = report["device"]["name"] + (f", driver {driver}" if driver else "")
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return f"{name}, {report['date'][:10]}: {versions}"


def cells(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
