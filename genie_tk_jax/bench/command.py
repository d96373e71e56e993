"""The command `bench`: its options, and what it prints and draws."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genie_tk_jax.bench import alphafold_command, alphafold_report, report, run
from genie_tk_jax.bench.arguments import (
    DTYPES,
    add_out,
    complain,
    positive,
    share,
    sizes,
    some_of,
    unwritable,
)
from genie_tk_jax.bench.costs import PASSES
from genie_tk_jax.bench.peers import PEERS
from genie_tk_jax.bench.workloads import WORKLOADS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench` and of its two readers of results, `table` and `plots`."""
    parser.set_defaults(command=_bench)
    for flag, known, default, what in (
        ("--workloads", tuple(WORKLOADS), tuple(WORKLOADS), "default: all"),
        ("--passes", PASSES, PASSES, "default: both"),
        ("--dtypes", DTYPES, DTYPES[:1], f"default: {DTYPES[0]}"),
        ("--peers", (*PEERS, "none"), tuple(PEERS), "default: all; none leaves XLA alone"),
    ):
        text = f"some of {', '.join(known)} ({what})"
        parser.add_argument(flag, type=some_of(known), default=default, metavar="A,B", help=text)
    parser.add_argument(
        "--sizes", type=sizes, default=(256, 512, 1024), metavar="N,N", help="of residues"
    )
    for flag, number, what in (
        ("--channels", 128, "of the pair representation, of all heads together, of a, b and t"),
        ("--heads", 4, "of attention; their number divides the channels"),
        ("--repeats", 10, "samples that a median is taken of"),
        ("--jobs", 1, "programs compiled at once before the run; 1 compiles them as they come"),
    ):
        text = f"{what} (default: {number})"
        parser.add_argument(flag, type=positive, default=number, metavar="N", help=text)
    parser.add_argument(
        "--masked", type=share, default=0.1, help="share of masked pairs (default: 0.1)"
    )
    add_out(parser)
    readers = parser.add_subparsers(required=False, metavar="{alphafold,table,plots}")
    alphafold = readers.add_parser("alphafold", help="time ColabFold's trunk with and without us")
    alphafold_command.add_arguments(alphafold)
    for name, command, what in (
        ("table", _table, "print the README's table of result files"),
        ("plots", _plots, "draw the plots of result files"),
    ):
        reader = readers.add_parser(name, help=what)
        reader.set_defaults(command=command)
        reader.add_argument("files", type=Path, nargs="+", metavar="JSON")
        if command is _plots:
            add_out(reader)
            continue
        reader.add_argument("--sizes", type=sizes, metavar="N,N", help="of residues (default: all)")
        reader.add_argument("--brief", action="store_true", help="leave out some of the columns")


def _bench(options: argparse.Namespace) -> int:
    """Returns 1 if a row of this library is not in order, 2 for a user's error."""
    if options.channels % options.heads:
        return complain(f"--heads {options.heads} does not divide --channels {options.channels}")
    if why := unwritable(options.out):
        return complain(why)
    chosen = run.Options(**{name: getattr(options, name) for name in run.Options._fields})
    print(report.HEADER)
    found = run.bench(chosen, options.out, options.arguments, _teller())
    print()
    report.show(found)
    _draw([found], options.out)
    return 1 if run.failed(found["rows"]) else 0


def _teller() -> Callable[[dict[str, Any]], None]:
    """Prints a row at once, but what is missing only the first time."""
    missing = set()

    def tell(row: dict[str, Any]) -> None:
        if row["status"] == "missing":
            if row["contestant"] in missing:
                return
            missing.add(row["contestant"])
        print(report.line(row), flush=True)

    return tell


def _table(options: argparse.Namespace) -> int:
    """Of the two kinds of reports, each in its own form."""
    found = _read(options.files)
    trunks = [one for one in found if one.get("kind") == "alphafold"]
    layers = [one for one in found if one.get("kind") != "alphafold"]
    columns = report.BRIEF if options.brief else report.COLUMNS
    parts = [report.markdown(layers, options.sizes, columns)] if layers else []
    print("\n\n".join([*parts, *map(alphafold_report.markdown, trunks)]))
    return 0


def _plots(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    return _draw(_read(options.files), options.out)


def _read(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def _draw(reports: Sequence[dict[str, Any]], out: Path) -> int:
    try:
        from genie_tk_jax.bench import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return complain(
            "plots need matplotlib: run  pip install 'genie_tk_jax[demo]'  and then  "
            f"genie-tk-jax bench plots {out / 'results.json'}"
        )
    for path in plots.draw(report.merged(reports), out):
        print(f"drew {path}")
    return 0
