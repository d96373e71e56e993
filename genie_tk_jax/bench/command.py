"""The command `bench`: its options, and what it prints and draws."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genie_tk_jax.bench import report, run
from genie_tk_jax.bench.costs import PASSES
from genie_tk_jax.bench.peers import PEERS
from genie_tk_jax.bench.workloads import WORKLOADS

DTYPES = ("bfloat16", "float16", "float32")


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
        parser.add_argument(flag, type=_some_of(known), default=default, metavar="A,B", help=text)
    parser.add_argument(
        "--sizes", type=_sizes, default=(256, 512, 1024), metavar="N,N", help="of residues"
    )
    for flag, number, what in (
        ("--channels", 128, "of the pair representation, of all heads together, of a, b and t"),
        ("--heads", 4, "of attention; their number divides the channels"),
        ("--repeats", 10, "samples that a median is taken of"),
        ("--jobs", 1, "programs compiled at once before the run; 1 compiles them as they come"),
    ):
        text = f"{what} (default: {number})"
        parser.add_argument(flag, type=_positive, default=number, metavar="N", help=text)
    parser.add_argument(
        "--masked", type=_share, default=0.1, help="share of masked pairs (default: 0.1)"
    )
    _add_out(parser)
    readers = parser.add_subparsers(required=False, metavar="{table,plots}")
    for name, command, what in (
        ("table", _table, "print the README's table of result files"),
        ("plots", _plots, "draw the plots of result files"),
    ):
        reader = readers.add_parser(name, help=what)
        reader.set_defaults(command=command)
        reader.add_argument("files", type=Path, nargs="+", metavar="JSON")
        if command is _plots:
            _add_out(reader)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("genie-bench"),
        metavar="DIR",
        help="where results.json and the plots go (default: genie-bench)",
    )


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join(known)}; separate several by commas"
                )
        return tuple(name for name in names if name != "none")

    return parse


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1; got {text!r}")
    return number


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1; got {text!r}")
    return share


def _bench(options: argparse.Namespace) -> int:
    """Returns 1 if a row of this library is not in order, 2 for a user's error."""
    if options.channels % options.heads:
        return _complain(f"--heads {options.heads} does not divide --channels {options.channels}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        return _complain(f"--out {options.out}: cannot be written ({error.strerror})")
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
    print(report.markdown(_read(options.files)))
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
        return _complain(
            "plots need matplotlib: run  pip install 'genie_tk_jax[demo]'  and then  "
            f"genie-tk-jax bench plots {out / 'results.json'}"
        )
    for path in plots.draw(report.merged(reports), out):
        print(f"drew {path}")
    return 0


def _complain(message: str) -> int:
    print(f"genie-tk-jax: {message}")
    return 2
