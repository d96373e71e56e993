"""The `genie-tk-jax` command: `demo`, `bench`, `convert` and `info`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from genie_tk_jax import __version__, convert
from genie_tk_jax.bench import command
from genie_tk_jax.demo.environment import environment
from genie_tk_jax.demo.measure import TOLERANCES

# By length, 76 to 393 residues; each is a file of genie_tk_jax/data.
PROTEINS = ("ubiquitin", "lysozyme", "gfp", "p53")

# What only the extra `demo` installs, by import name; rich comes with flax.
DEMO_EXTRA = ("gemmi", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 for success, 1 when the demo's check fails, 2 for a user's error."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="genie-tk-jax", description="The triangle layers of AlphaFold 2-style models, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"genie_tk_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="versions, devices and the kernel library")
    info.set_defaults(command=_info)
    demo = commands.add_parser("demo", help="run a pair stack on a protein and check every layer")
    demo.set_defaults(command=_demo)
    _add_demo_arguments(demo)
    bench = commands.add_parser("bench", help="time every stage and layer against other libraries")
    command.add_arguments(bench)
    conversion = commands.add_parser(
        "convert", help="list the triangle layers of a checkpoint, or turn them into another layout"
    )
    conversion.set_defaults(command=_convert)
    _add_convert_arguments(conversion)
    return parser


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--protein",
        choices=PROTEINS,
        default=PROTEINS[0],
        help="one that ships with the package (default: ubiquitin)",
    )
    source.add_argument("--fasta", type=Path, metavar="F", help="the first record of a FASTA file")
    source.add_argument(
        "--structure", type=Path, metavar="F", help="the first protein chain of a .pdb or .cif"
    )
    whole = _whole_number(1)
    parser.add_argument("--blocks", type=whole, default=4, help="depth of the stack (default: 4)")
    parser.add_argument(
        "--dtype",
        choices=tuple(TOLERANCES),
        default="bfloat16",
        help="of the pair representation (default: bfloat16)",
    )
    parser.add_argument(
        "--implementation",
        choices=("cuda", "xla"),
        help="of the triangle layers (default: cuda wherever it applies)",
    )
    parser.add_argument(
        "--seed", type=_whole_number(0), default=0, help="of all weights (default: 0)"
    )
    parser.add_argument(
        "--repeats", type=whole, default=5, help="timed calls of each layer (default: 5)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("genie-demo"),
        metavar="DIR",
        help="where the plots and demo.json go (default: genie-demo)",
    )


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SRC", help=f"one of {', '.join(convert.READABLE)}"
    )
    parser.add_argument(
        "destination",
        type=Path,
        nargs="?",
        metavar="DST",
        help=f"one of {', '.join(convert.WRITABLE)}",
    )
    parser.add_argument(
        "--from",
        dest="host",
        choices=tuple(convert.HOSTS),
        help="the layout of SRC (default: told by its names)",
    )
    parser.add_argument(
        "--to",
        choices=tuple(convert.HOSTS),
        default="canonical",
        help="the layout of DST (default: canonical, which holds the triangle layers only)",
    )
    parser.add_argument("--list", action="store_true", help="list what SRC holds and write nothing")


def _whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to the largest seed that JAX takes everywhere."""

    def parse(text: str) -> int:
        number = int(text) if text.isdecimal() else -1
        if not least <= number < 2**31:
            raise argparse.ArgumentTypeError(
                f"expected a number from {least} to {2**31 - 1}; got {text!r}"
            )
        return number

    return parse


def _info(options: argparse.Namespace) -> int:
    for name, value in environment().items():
        print(f"{name:<13} {value}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from genie_tk_jax.demo import proteins, run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        return _user_error(f"the demo needs {error.name}: run  pip install 'genie_tk_jax[demo]'")
    try:
        if options.fasta:
            protein = proteins.read_fasta(options.fasta)
        elif options.structure:
            protein = proteins.read_structure(options.structure)
        else:
            protein = proteins.shipped(options.protein)
        passed = run.demo(
            protein,
            blocks=options.blocks,
            dtype=options.dtype,
            implementation=options.implementation,
            seed=options.seed,
            repeats=options.repeats,
            out=options.out,
        )
    except proteins.InputError as error:
        return _user_error(str(error))
    return 0 if passed else 1


def _convert(options: argparse.Namespace) -> int:
    if not options.list and options.destination is None:
        return _user_error("convert needs DST, the file to write, or --list")
    try:
        entries = convert.read(options.source)
        host = options.host or convert.detect(entries)
        print(f"{options.source}: {host}\n{convert.listing(convert.load(entries, host))}")
        bias = convert.arguments(host, convert.LAYERS[-1])["ending_bias"]
        if bias != "swapped":
            print(f"the ending node of {host} is triangle_attention(ending_bias={bias!r})")
        if options.list:
            return 0
        result = convert.translate(entries, host, options.to)
        arrays = {key: value for key, value in result.items() if convert.is_array(value)}
        convert.write(options.destination, arrays)
    except (ImportError, OSError, TypeError, ValueError) as error:
        return _user_error(str(error))
    if left_out := len(result) - len(arrays):
        print(f"left out {left_out} entries that are not arrays")
    print(f"wrote {len(arrays)} entries to {options.destination}: {options.to}")
    return 0


def _user_error(message: str) -> int:
    print(f"genie-tk-jax: {message}", file=sys.stderr)
    return 2
