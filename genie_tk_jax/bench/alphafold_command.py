"""The command `bench alphafold`: its options, and what it prints."""

import argparse

from genie_tk_jax.bench import alphafold, alphafold_report
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
from genie_tk_jax.bench.trunk import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench alphafold`."""
    parser.set_defaults(command=_bench)
    known = tuple(VARIANTS)
    text = f"some of {', '.join(known)} (default: all)"
    parser.add_argument(
        "--contestants", type=some_of(known), default=known, metavar="A,B", help=text
    )
    for flag, default, what in (
        ("--sizes", (256, 512, 1024), "of residues"),
        ("--blocks", (1, 4), "depths of the trunk"),
    ):
        text = f"{what} (default: {','.join(map(str, default))})"
        parser.add_argument(flag, type=sizes, default=default, metavar="N,N", help=text)
    for flag, number, what in (
        ("--msa", 32, "sequences of the alignment"),
        ("--repeats", 5, "samples that a median is taken of"),
        ("--seconds", 600, "after these nothing more is begun"),
        ("--design-blocks", 48, "depth of the trunk whose longest design is sought"),
        ("--design-msa", 1, "sequences of the alignment there"),
    ):
        text = f"{what} (default: {number})"
        parser.add_argument(flag, type=positive, default=number, metavar="N", help=text)
    parser.add_argument(
        "--no-design", dest="design_blocks", action="store_const", const=0, help="do not seek it"
    )
    parser.add_argument(
        "--only-design",
        dest="sizes",
        action="store_const",
        const=(),
        help="seek it, and time no trunk: the GPU stays idle",
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="GIB",
        help="that a design may take (default: what JAX may use of this device)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the activations")
    parser.add_argument(
        "--masked", type=share, default=0.1, help="share of padded residues (default: 0.1)"
    )
    add_out(parser)


def _bench(options: argparse.Namespace) -> int:
    """Returns 1 if the swap is wrong somewhere, 2 for a user's error."""
    if why := unwritable(options.out):
        return complain(why)
    fields = alphafold.Options._fields
    chosen = alphafold.Options(**{name: getattr(options, name) for name in fields})
    print(alphafold_report.HEADER)
    try:
        found = alphafold.bench(
            chosen,
            options.out,
            options.arguments,
            lambda part, row: print(alphafold_report.line(part, row), flush=True),
        )
    except ImportError as error:
        return complain(
            f"{error}: run  pip install 'genie_tk_jax[haiku]' alphafold-colabfold colabfold-kernels"
        )
    print(f"\n{alphafold_report.markdown(found)}")
    return 1 if any(row["status"] == "wrong" for row in found["rows"]) else 0
