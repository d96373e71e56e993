"""What the demo reads: its own proteins, FASTA, PDB and mmCIF, and what it refuses."""

import numpy as np
import pytest

pytest.importorskip("gemmi", reason="structures are read by gemmi, which is not installed")

from genie_tk_jax import cli  # noqa: E402
from genie_tk_jax.demo import proteins  # noqa: E402

LENGTHS = {"ubiquitin": 76, "lysozyme": 129, "gfp": 238, "p53": 393}
# Average residue masses in dalton; with one water they give a protein's mass.
MASSES = {
    **{"G": 57.0519, "A": 71.0788, "S": 87.0782, "P": 97.1167, "V": 99.1326, "T": 101.1051},
    **{"C": 103.1388, "L": 113.1594, "I": 113.1594, "N": 114.1038, "D": 115.0886, "Q": 128.1307},
    **{"K": 128.1741, "E": 129.1155, "M": 131.1926, "H": 137.1411, "F": 147.1766, "R": 156.1875},
    **{"Y": 163.1760, "W": 186.2132},
}
# What UniProt states for the four sequences.
PROTEIN_MASSES = {"ubiquitin": 8565, "lysozyme": 14313, "gfp": 26886, "p53": 43653}


def letters(protein):
    return "".join(proteins.RESIDUE_TYPES[i] for i in protein.residue_types)


def pdb_atom(atom, residue, chain, number, position):
    x, y, z = position
    return (
        f"ATOM      1  {atom:<3} {residue:>3} {chain}{number:>4}    "
        f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {atom[0]}"
    )


def pdb_file(path, atoms, sequence=()):
    """A PDB file of (atom, residue, chain, number, position), with SEQRES for chain B if given."""
    lines = [
        f"SEQRES {1 + i // 13:>3} B {len(sequence):>4}  {' '.join(sequence[i : i + 13])}"
        for i in range(0, len(sequence), 13)
    ]
    path.write_text("\n".join([*lines, *(pdb_atom(*atom) for atom in atoms), "END", ""]))
    return path


BACKBONE = {"N": (-0.525, 1.363, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.526, 0.0, 0.0)}
# Where an ideal alanine with that backbone has its C-beta.
IDEAL_C_BETA = (-0.529, -0.774, -1.205)


def residue_at(x, name, number, chain="B", c_beta=False):
    """An ideal residue moved by x angstrom along the first axis."""
    atoms = {**BACKBONE, "CB": IDEAL_C_BETA} if c_beta else BACKBONE
    return [
        (atom, name, chain, number, (position[0] + x, *position[1:]))
        for atom, position in atoms.items()
    ]


DNA = [("P", "DA", "A", 1, (90, 0, 0)), ("P", "DT", "A", 2, (96, 0, 0))]


@pytest.mark.parametrize("name", cli.PROTEINS)
def test_shipped_protein_is_the_one_that_uniprot_has(name):
    protein = proteins.shipped(name)
    sequence = letters(protein)
    assert len(sequence) == LENGTHS[name]
    assert sum(MASSES[letter] for letter in sequence) + 18.0153 == pytest.approx(
        PROTEIN_MASSES[name], abs=0.5
    )
    np.testing.assert_array_equal(protein.residue_index, np.arange(LENGTHS[name]))
    assert protein.c_beta is None


def test_fasta_takes_the_first_record_and_maps_unknown_letters(tmp_path):
    path = tmp_path / "two.fasta"
    path.write_text("\n>first protein\nacd efg\n\nBUZXJOw*\n>second\nMMMM\n")
    protein = proteins.read_fasta(path)
    assert protein.name == "first protein"
    assert letters(protein) == "ACDEFGXXXXXXW"
    assert protein.residue_types.dtype == protein.residue_index.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.fasta: is empty; expected a '>' header"),
        ("  \n\n", "x.fasta: is empty; expected a '>' header"),
        ("\nMKV\n", "x.fasta, line 2: found 'MKV'; expected a '>' header"),
        (">only a header\n", "x.fasta, line 1: no sequence follows the header '>only a header'"),
        (">a\n>b\nMKV\n", "x.fasta, line 1: no sequence follows"),
        (">a\nMKV\nMK-V\n", "x.fasta, line 3: found '-'; expected one-letter residue codes"),
        (">a\nM1\n", "x.fasta, line 2: found '1'"),
        (">a\nM*K\n", "x.fasta, line 2: found '*'"),
        (">a\nMÄK\n", "x.fasta, line 2: found 'Ä'"),
    ],
)
def test_malformed_fasta_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "x.fasta"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(proteins.InputError) as refusal:
        proteins.read_fasta(path)
    assert message in str(refusal.value)


def test_unreadable_fasta_is_refused(tmp_path):
    binary = tmp_path / "binary.fasta"
    binary.write_bytes(b">\xff\xfe\n")
    for path in (tmp_path / "absent.fasta", tmp_path, binary):
        with pytest.raises(proteins.InputError, match=path.name):
            proteins.read_fasta(path)


def test_pdb_gives_the_first_protein_chain_and_its_gaps(tmp_path):
    atoms = [*DNA, *residue_at(0, "GLY", 5), *residue_at(9, "MSE", 6, c_beta=True)]
    atoms += [("CA", "TRP", "B", 9, (20, 0, 0)), *residue_at(30, "ALA", 10, chain="C")]
    protein = proteins.read_structure(pdb_file(tmp_path / "x.pdb", atoms))
    assert protein.name.endswith("chain B")
    assert letters(protein) == "GMW"
    np.testing.assert_array_equal(protein.residue_index, [0, 1, 4])
    np.testing.assert_allclose(protein.c_beta[0], IDEAL_C_BETA, atol=0.03)
    np.testing.assert_allclose(protein.c_beta[1] - [9, 0, 0], IDEAL_C_BETA, atol=2e-3)
    assert np.isnan(protein.c_beta[2]).all()


def test_pdb_with_seqres_keeps_residues_without_coordinates(tmp_path):
    atoms = [*DNA, *residue_at(0, "GLY", 2), *residue_at(9, "ALA", 4, c_beta=True)]
    path = pdb_file(tmp_path / "x.pdb", atoms, sequence=("MET", "GLY", "TRP", "ALA", "LYS"))
    protein = proteins.read_structure(path)
    assert letters(protein) == "MGWAK"
    np.testing.assert_array_equal(protein.residue_index, np.arange(5))
    np.testing.assert_array_equal(np.isnan(protein.c_beta[:, 0]), [1, 0, 1, 0, 1])


def test_insertion_codes_still_count_as_steps(tmp_path):
    atoms = [atom for x, n in ((0, 7), (4, 8), (8, 9)) for atom in residue_at(x, "ALA", n)]
    path = pdb_file(tmp_path / "x.pdb", atoms)
    path.write_text(path.read_text().replace("B   8 ", "B   7A"))
    np.testing.assert_array_equal(proteins.read_structure(path).residue_index, [0, 1, 3])


def mmcif(sequence, rows):
    """mmCIF of one protein entity; rows are (atom, residue, label_seq, author number, x, y, z)."""
    listed = "\n".join(f"1 {number} {name} n" for number, name in enumerate(sequence, 1))
    atoms = "\n".join(
        f"ATOM {i} {atom[0]} {atom} . {name} A 1 {label} {x} {y} {z} 1 0 {author} Q 1"
        for i, (atom, name, label, author, x, y, z) in enumerate(rows, 1)
    )
    columns = "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id"
    columns += " label_entity_id label_seq_id Cartn_x Cartn_y Cartn_z occupancy"
    columns += " B_iso_or_equiv auth_seq_id auth_asym_id pdbx_PDB_model_num"
    heads = "\n".join(f"_atom_site.{column}" for column in columns.split())
    return f"""data_TINY
_entry.id TINY
loop_
_entity.id
_entity.type
1 polymer
loop_
_entity_poly.entity_id
_entity_poly.type
1 'polypeptide(L)'
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
_entity_poly_seq.hetero
{listed}
loop_
{heads}
{atoms}
"""


def test_mmcif_places_residues_by_their_label(tmp_path):
    # The author's numbers start anywhere and jump; the label says where a residue belongs.
    rows = [("CB", "ALA", 2, 101, 1.0, 2.0, 3.0), ("CB", "SER", 4, 250, 4.0, 6.0, 3.0)]
    path = tmp_path / "tiny.cif"
    path.write_text(mmcif(("MET", "ALA", "GLY", "SER"), rows))
    protein = proteins.read_structure(path)
    assert protein.name == "TINY, chain Q"
    assert letters(protein) == "MAGS"
    np.testing.assert_array_equal(protein.residue_index, np.arange(4))
    np.testing.assert_array_equal(protein.c_beta[[1, 3]], [[1, 2, 3], [4, 6, 3]])
    assert np.isnan(protein.c_beta[[0, 2]]).all()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.pdb", "hello\n", "holds no protein chain"),
        ("x.pdb", "\n".join(pdb_atom(*atom) for atom in DNA) + "\nEND\n", "no protein chain"),
        ("x.cif", "hello\n", "cannot be read as PDB or mmCIF"),
        ("x.cif", "", "cannot be read as PDB or mmCIF"),
        ("x.cif", "data_x\n_cell.length_a 3\n", "holds no protein chain"),
        ("x.doc", "hello\n", "cannot be read as PDB or mmCIF"),
    ],
)
def test_file_without_a_protein_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(proteins.InputError, match=message) as refusal:
        proteins.read_structure(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_absent_structure_is_refused(tmp_path):
    with pytest.raises(proteins.InputError, match="no such file"):
        proteins.read_structure(tmp_path / "absent.cif")
