"""The demo: its features, its stack, and the command from end to end."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

for module in ("gemmi", "matplotlib", "rich"):
    pytest.importorskip(module, reason=f"the demo needs {module}, which is not installed")

from PIL import Image  # noqa: E402

from genie_tk_jax import cli  # noqa: E402
from genie_tk_jax.demo import measure, pair, proteins, stack  # noqa: E402


def test_relative_positions_are_clipped_differences():
    classes = pair.relative_positions(np.array([0, 1, 31, 32, 33, 400], np.int32))
    np.testing.assert_array_equal(classes[0], [32, 31, 1, 0, 0, 0])
    np.testing.assert_array_equal(classes[:, 0], [32, 33, 63, 64, 64, 64])
    np.testing.assert_array_equal(np.diag(classes), 32)


def test_distogram_has_the_bins_of_alphafold():
    # 47.5 angstrom in 38 bins are 1.25 each: 3.25 to 4.5 is bin 0, beyond 50.75 is bin 38.
    places = np.array([0.0, 3.2, 4.4, 4.6, 50.7, 50.8, 900.0, np.nan])
    c_beta = np.stack([places, 0 * places, 0 * places], axis=-1)
    feature = pair.distogram(pair.distances(c_beta))
    assert feature.shape == (8, 8, 40) and feature.dtype == np.float32
    first = feature[0, :, :39]
    np.testing.assert_array_equal(first.sum(axis=-1), [0, 0, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(first[2:7].argmax(axis=-1), [0, 1, 37, 38, 38])
    np.testing.assert_array_equal(feature[0, :, 39], [1, 1, 1, 1, 1, 1, 1, 0])
    assert not feature[7].any() and not feature[:, 7].any()


def test_embedding_reads_types_positions_and_distances():
    key, types = jax.random.key(0), np.array([0, 5, 0, 5], np.int32)
    index = np.array([0, 1, 2, 3], np.int32)
    bare = proteins.Protein("x", types, index, None)
    z = np.asarray(pair.embed(bare, key, 8))
    # The same two types at the same offset make the same pair, and nothing else is read.
    np.testing.assert_allclose(z[0, 1], z[2, 3], rtol=1e-6)
    assert np.abs(z[0, 1] - z[1, 0]).min() > 0
    far = bare._replace(residue_index=index + np.array([0, 0, 40, 40], np.int32))
    changed = np.abs(np.asarray(pair.embed(far, key, 8)) - z).max(axis=-1) > 0
    np.testing.assert_array_equal(changed, (index[:, None] < 2) != (index[None] < 2))
    c_beta = np.array([[0, 0, 0], [5, 0, 0], [np.nan] * 3, [9, 0, 0]])
    added = np.abs(np.asarray(pair.embed(bare._replace(c_beta=c_beta), key, 8)) - z)
    known = np.isfinite(c_beta[:, 0])
    between = np.where(known[:, None] & known, 1, 0)
    background = added[2, 2]
    np.testing.assert_array_equal(
        np.abs(added - background).max(axis=-1) > 1e-5, between.astype(bool)
    )


def test_transition_is_algorithm_15():
    params = stack.init_transition(jax.random.key(0), 16)
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(params))
    z = np.random.default_rng(0).normal(size=(3, 3, 16))
    x = z - z.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = x * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"])
    hidden = x @ np.asarray(params["expand"]["kernel"]) + np.asarray(params["expand"]["bias"])
    truth = np.maximum(hidden, 0) @ np.asarray(params["contract"]["kernel"])
    truth = truth + np.asarray(params["contract"]["bias"])
    with jax.default_matmul_precision("highest"):
        found = stack.transition(z.astype(np.float32), None, params)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "short.fasta"
    path.write_text(">a [short] peptide\nMKVLAAGWYTRE\n")
    return path


def test_demo_from_fasta_to_files(fasta, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    arguments = ["demo", "--fasta", str(fasta), "--blocks", "1", "--repeats", "2"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "demo.json",
        "pair_before_after.png",
        "time_per_layer.png",
    ]
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 1000 and len(set(image.convert("L").tobytes())) > 20
    report = json.loads((out / "demo.json").read_text())
    assert report["protein"] == {"name": "a [short] peptide", "residues": 12}
    assert report["options"]["dtype"] == "bfloat16" and report["options"]["blocks"] == 1
    assert report["environment"]["jax"] == jax.__version__
    assert [row["layer"] for row in report["layers"]] == [layer.name for layer in stack.BLOCK]
    for row in report["layers"]:
        assert 1e-4 < row["error"] <= report["tolerance"] == 3e-2 and row["passed"]
        assert row["milliseconds"] > 0 and row["reference_milliseconds"] > 0
        assert row["implementation"] and row["reason"]
    printed = capsys.readouterr().out
    assert "a [short] peptide: 12 residues, bfloat16, depth 1" in printed
    assert all(layer.name in printed for layer in stack.BLOCK)


def test_demo_of_a_structure_draws_its_distances(tmp_path):
    path, out = tmp_path / "six.pdb", tmp_path / "out"
    path.write_text(
        "".join(
            f"ATOM  {i:5}  CB  ALA A{i:4}    {4 * i:8.3f}   0.000   0.000  1.00  0.00           C\n"
            for i in range(1, 7)
        )
    )
    arguments = ["--structure", str(path), "--out", str(out), "--dtype", "float32"]
    assert cli.main(["demo", *arguments, "--blocks", "1", "--repeats", "1"]) == 0
    with Image.open(out / "pair_before_after.png") as image:
        assert image.width > 2.5 * image.height
    report = json.loads((out / "demo.json").read_text())
    assert max(row["error"] for row in report["layers"]) <= report["tolerance"] == 1e-4


def test_demo_fails_when_a_layer_is_wrong(fasta, tmp_path, monkeypatch, capsys):
    """A layer that is NaN in low precision only: exit code 1, FAIL in the table, null in JSON."""

    def wrong(z, mask, params, *, implementation=None):
        update = stack.transition(z, mask, params)
        return update if z.dtype == np.float32 else update * np.nan

    block = (*stack.BLOCK[:-1], stack.BLOCK[-1]._replace(apply=wrong))
    monkeypatch.setattr(measure, "BLOCK", block)
    arguments = ["demo", "--fasta", str(fasta), "--blocks", "1", "--repeats", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    layers = json.loads((tmp_path / "demo.json").read_text())["layers"]
    assert [row["passed"] for row in layers] == [True] * 4 + [False]
    assert layers[-1]["error"] is None
    assert capsys.readouterr().out.count("FAIL") == 1


def test_stack_is_the_same_for_the_same_seed():
    draws = [jax.tree.leaves(measure.init_stack(jax.random.key(s), 2)) for s in (3, 3, 4)]
    for one, same, other in zip(*draws, strict=True):
        np.testing.assert_array_equal(one, same)
        assert np.all(np.asarray(one) != 0) and np.any(one != other)


def test_user_errors_are_one_line_and_code_2(fasta, tmp_path, capsys):
    occupied, empty, out = tmp_path / "occupied", tmp_path / "empty.fasta", tmp_path / "out"
    occupied.write_text("")
    empty.write_text("")
    cases = [
        (["--fasta", tmp_path / "absent.fasta", "--out", out], "absent.fasta"),
        (["--fasta", empty, "--out", out], "is empty"),
        (["--structure", fasta, "--out", out], "cannot be read as PDB or mmCIF"),
        (["--fasta", fasta, "--out", occupied], f"--out {occupied}"),
    ]
    if jax.default_backend() == "cpu":
        cases.append((["--fasta", fasta, "--implementation", "cuda", "--out", out], "cuda"))
    for arguments, message in cases:
        assert cli.main(["demo", *map(str, arguments)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("genie-tk-jax: ") and message in printed
        assert printed.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["demo", "--blocks", "0"],
        ["demo", "--seed", "-1"],
        ["demo", "--repeats", "2.5"],
        ["demo", "--dtype", "float64"],
        ["demo", "--protein", "insulin"],
        ["demo", "--fasta", "a", "--structure", "b"],
    ],
)
def test_malformed_commands_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("missing", cli.DEMO_EXTRA)
def test_missing_extra_is_named(missing):
    """In a fresh interpreter, as this one has the package already."""
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom genie_tk_jax import cli\n"
    run = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(cli.main(['demo']))"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr
    assert missing in run.stderr and "pip install 'genie_tk_jax[demo]'" in run.stderr


def test_command_line_needs_no_extra_for_info():
    """`python -m genie_tk_jax info` says what a bug report needs, without the demo's packages."""
    code = "import runpy, sys\n"
    code += f"for name in {cli.DEMO_EXTRA}: sys.modules[name] = None\n"
    code += "sys.argv = ['x', 'info']; runpy.run_module('genie_tk_jax', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    names = [line.split()[0] for line in run.stdout.splitlines()]
    assert names == ["genie_tk_jax", "python", "jax", "jaxlib", "flax", "devices", "kernels"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("genie_tk_jax ")
