"""What the benchmark's commands have in common: types of options, and words for a user's error."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option `--out`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("genie-bench"),
        metavar="DIR",
        help="where the results and the plots go (default: genie-bench)",
    )


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names separated by commas, in the order given; "none" stands for no name."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join(known)}; separate several by commas"
                )
        return tuple(name for name in names if name != "none")

    return parse


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1; got {text!r}")
    return number


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers from 1, separated by commas."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def share(text: str) -> float:
    """From 0 to below 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1; got {text!r}")
    return share


def unwritable(out: Path) -> str:
    """Makes the folder `out`; says why nothing can be written there, or nothing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return ""
    except OSError as error:
        return f"--out {out}: cannot be written ({error.strerror})"


def complain(message: str) -> int:
    """Prints a user's error; returns the exit status for it."""
    print(f"genie-tk-jax: {message}")
    return 2
