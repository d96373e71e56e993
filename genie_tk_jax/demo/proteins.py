"""Proteins to run on: a few that ship with the package, any FASTA file, any PDB or mmCIF file."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np

# AlphaFold's order. X stands for every residue that is none of the twenty.
RESIDUE_TYPES = "ARNDCQEGHILKMFPSTWYVX"


class InputError(ValueError):
    """The user's input cannot be used; the message is the one line that says why."""


class Protein(NamedTuple):
    """One protein chain, as much of it as the pair representation needs.

    residue_types: int32 [N], positions in RESIDUE_TYPES.
    residue_index: int32 [N], rising; a step of more than 1 is a gap in the chain.
    c_beta: float64 [N, 3] in angstrom, NaN for a residue without one; None for a bare sequence.
    """

    name: str
    residue_types: np.ndarray
    residue_index: np.ndarray
    c_beta: np.ndarray | None


def shipped(name: str) -> Protein:
    """A protein of the package's own, by the name of its file in genie_tk_jax/data."""
    with resources.as_file(resources.files("genie_tk_jax") / "data" / f"{name}.fasta") as path:
        return read_fasta(path)


def read_fasta(path: Path) -> Protein:
    """The first record of a FASTA file; letters other than the twenty become X.

    Raises:
      InputError: no such file, not text, or not FASTA; names the file, the line and what it holds.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file ({error})") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: is empty; expected a '>' header line, then a sequence")
    (first, header), *rest = numbered
    if not header.startswith(">"):
        raise InputError(f"{path}, line {first}: found {header[:20]!r}; expected a '>' header line")
    sequence = ""
    for number, line in rest:
        if line.startswith(">"):
            break
        sequence += _letters(path, number, line)
    if not sequence:
        raise InputError(f"{path}, line {first}: no sequence follows the header {header[:40]!r}")
    name = header[1:].strip() or path.stem
    return Protein(name, _types(sequence), np.arange(len(sequence), dtype=np.int32), None)


def read_structure(path: Path) -> Protein:
    """The first protein chain of the first model of a PDB or mmCIF file.

    Residues of the entity's sequence that have no coordinates are kept: they are part of the
    chain and take part in everything but the distogram. A file without that sequence gives the
    residues it has, with the file's numbering, in which missing residues show as gaps.

    Raises:
      InputError: no such file, not PDB or mmCIF, or no protein chain in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        structure = gemmi.read_structure(str(path))
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read as PDB or mmCIF ({reason})") from error
    structure.setup_entities()
    structure.assign_label_seq_id()
    chain, polymer = _first_protein(path, structure)
    name = f"{structure.name or path.stem}, chain {chain.name}"
    residues = list(polymer.first_conformer())
    entity = structure.get_entity_of(polymer)
    labels = [residue.label_seq for residue in residues if residue.label_seq is not None]
    labelled = len(labels) == len(residues)
    if labelled and entity and entity.full_sequence:
        names = [gemmi.Entity.first_mon(item) for item in entity.full_sequence]
        index = np.arange(len(names), dtype=np.int32)
        places = [label - 1 for label in labels]
    else:
        names = [residue.name for residue in residues]
        index = _rising(labels if labelled else [residue.seqid.num or 0 for residue in residues])
        places = list(range(len(residues)))
    c_beta = np.full((len(names), 3), np.nan)
    c_beta[places] = [_c_beta(residue) for residue in residues]
    sequence = "".join(gemmi.find_tabulated_residue(name).one_letter_code for name in names)
    return Protein(name, _types(sequence), index, c_beta)


def _letters(path: Path, number: int, line: str) -> str:
    """The residues of one sequence line, in capitals, without the '*' that may end a sequence."""
    letters = "".join(line.split()).removesuffix("*").upper()
    for letter in letters:
        if not ("A" <= letter <= "Z"):
            raise InputError(
                f"{path}, line {number}: found {letter!r}; expected one-letter residue codes"
            )
    return letters


def _types(sequence: str) -> np.ndarray:
    """AlphaFold's residue types; gemmi writes a modified residue as its parent in lower case."""
    unknown = RESIDUE_TYPES.index("X")
    place = {letter: i for i, letter in enumerate(RESIDUE_TYPES)}
    return np.array([place.get(letter, unknown) for letter in sequence.upper()], np.int32)


def _first_protein(path: Path, structure: gemmi.Structure):
    """The chain and its polymer residues."""
    peptides = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    if len(structure):
        for chain in structure[0]:
            polymer = chain.get_polymer()
            if polymer.check_polymer_type() in peptides:
                return chain, polymer
    raise InputError(f"{path}: holds no protein chain; expected one in its first model")


def _rising(numbers: Sequence[int]) -> np.ndarray:
    """int32 from 0 that rises by at least one a residue: insertion codes repeat a number."""
    steps = np.maximum(np.diff(numbers), 1)
    return np.concatenate([[0], np.cumsum(steps)]).astype(np.int32)


def _c_beta(residue: gemmi.Residue) -> np.ndarray:
    """The C-beta in angstrom, [3]; NaN where it is absent and the backbone cannot place it.

    Glycine gets the C-beta that an alanine would have there, so that all distances are between
    the same atoms. (AlphaFold 2 takes glycine's C-alpha, up to 1.5 angstrom away.)
    """
    found = _position(residue, "CB")
    if np.isfinite(found).all():
        return found
    n, c_alpha, c = (_position(residue, name) for name in ("N", "CA", "C"))
    from_n, to_c = c_alpha - n, c - c_alpha
    # Ideal tetrahedral geometry in the frame of the backbone.
    normal = np.cross(from_n, to_c)
    return c_alpha - 0.58273431 * normal + 0.56802827 * from_n - 0.54067466 * to_c


def _position(residue: gemmi.Residue, atom: str) -> np.ndarray:
    """Coordinates of an atom, of its first alternative if it has several; NaN if absent."""
    found = residue.find_atom(atom, "*")
    return np.array(found.pos.tolist()) if found else np.full(3, np.nan)
