"""Fills in the tables of the documents, from the root of the project:

    python benchmarks/tables.py README.md docs/speed.md

Between `<!-- bench table ARGUMENTS -->` and `<!-- end of table -->` stands what
`genie-tk-jax bench table ARGUMENTS` prints.
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from genie_tk_jax import cli

TABLE = re.compile("(<!-- (bench table .*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text of a document with its tables as they should be."""
    return TABLE.sub(lambda found: f"{found[1]}\n{_printed(found[2])}\n{found[3]}", text)


def _printed(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(shlex.split(command))
    return printed.getvalue()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
