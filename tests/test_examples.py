"""The examples run, at small sizes and without parameters of real models."""

import importlib.util
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import haiku_hosts
import jax
import numpy as np
import pytest
from scripts import load

from genie_tk_jax import convert

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name, monkeypatch):
    """The example as a module; run where XLA's settings can still be given, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load(EXAMPLES / f"{name}.py")


def needs(package, host):
    pytest.importorskip("haiku", reason="dm-haiku is not installed")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{host} is not installed")


@pytest.mark.slow
def test_alphafold_swap(tmp_path, monkeypatch, capsys):
    """On a file of parameters with AlphaFold's names, unfused as AlphaFold's own are."""
    needs("alphafold", "AlphaFold 2")
    haiku_hosts.stand_in_for_colabfold_kernels()
    swap = example("alphafold_swap", monkeypatch)
    arguments = ["--length", "8", "--blocks", "1", "--dtype", "float32"]
    options = swap.arguments().parse_args(arguments)
    params = swap.parameters(options, swap.features(np.random.default_rng(0), options.length))
    stored = {swap.PREFIX + scope: leaves for scope, leaves in params.items()}
    convert.write(tmp_path / "params.npz", convert.translate(stored, to="alphafold2"))
    again = swap.parameters(
        swap.arguments().parse_args([*arguments, "--params", str(tmp_path / "params.npz")]),
        swap.features(np.random.default_rng(0), options.length),
    )
    jax.tree.map(np.testing.assert_array_equal, again, params)

    assert swap.main([*arguments, "--params", str(tmp_path / "params.npz")]) == 0
    printed = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"(?:single|pair) (\S+e-\d+)", printed)]
    # Not the same bits: they come from other code.
    assert len(errors) == 2 and 0 < max(errors) < 1e-4
    assert re.search(r"\d of \d+ kinds of calls", printed)


@pytest.mark.slow
def test_colabdesign_swap(monkeypatch, capsys):
    """Loss and sequence gradient of a hallucination, through the whole model, with dropout on."""
    needs("colabdesign", "ColabDesign")
    swap = example("colabdesign_swap", monkeypatch)
    assert swap.main(["--length", "16", "--blocks", "1", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"loss (\S+) without, (\S+) with; gradients differ by (\S+)", printed)
    host, ours, error = map(float, found.groups())
    assert abs(ours - host) < 1e-5 * abs(host)
    assert 0 < error < 1e-3
    assert "old_jax_names" in sys.modules


def needs_structures():
    for package in ("gemmi", "matplotlib", "optax"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from test_demo_proteins import pdb_file, residue_at

    return pdb_file, residue_at


def straight_chain(path):
    """24 residues in a line, 4 angstrom apart; the fifth has no coordinates."""
    pdb_file, residue_at = needs_structures()
    sequence = ["ALA", "GLY", "LEU", "SER"] * 6
    residues = [(4.0 * i, name, i + 1) for i, name in enumerate(sequence) if i != 4]
    atoms = [atom for residue in residues for atom in residue_at(*residue)]
    return pdb_file(path, atoms, sequence)


def test_distogram_reads_structures(tmp_path, monkeypatch):
    """Crops lie within a chain; what is unresolved or padding has no distance."""
    path = straight_chain(tmp_path / "x.pdb")
    distogram = example("distogram", monkeypatch)
    chain = distogram.sample(distogram.proteins.read_structure(path))
    assert chain.valid.all() and not chain.known[4].any() and not chain.known[:, 4].any()
    # 8 angstrom lies between 7.9375 and 8.25, edges 18 and 19 of 63.
    assert chain.bins[0, 2] == 19 and chain.bins[0, 0] == 0 and chain.bins[0, 23] == 63
    draw = partial(distogram.draw, [chain], seed=3)
    first, again, later = (draw(step, batch=4, crop=16) for step in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.bins.shape == (4, 16, 16) and first.valid.all()
    assert not np.array_equal(first.types, later.types)
    padded = draw(0, batch=1, crop=30)
    assert padded.valid.sum() == 24 and padded.known.sum() == 23 * 23


@pytest.mark.slow
def test_train(tmp_path, monkeypatch, capsys):
    """The loss falls, and a run that was ended goes on with the same bits."""
    path = str(straight_chain(tmp_path / "x.pdb"))
    train = example("train", monkeypatch)
    built, build, save = [], train.build, train.save

    def build_once(*arguments):
        """Compiled once for both runs; the state is donated, so each gets its own."""
        if not built:
            program = build(*arguments)
            built.append((program, jax.tree.map(np.asarray, program.state)))
        program, state = built[0]
        return program._replace(state=jax.tree.map(jax.numpy.array, state))

    def save_and_keep(checkpoint, state, losses, settings):
        save(checkpoint, state, losses, settings)
        shutil.copy(checkpoint, tmp_path / f"{len(losses)}.npz")

    monkeypatch.setattr(train, "build", build_once)
    monkeypatch.setattr(train, "save", save_and_keep)
    numbers = "--crop 16 --batch 1 --blocks 2 --warm-up 2 --save-every 7 --rate 3e-3".split()
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    fit = ["fit", path, *numbers, "--steps", "10"]
    assert train.main([*fit, "--out", str(whole)]) == 0
    ended.mkdir()
    shutil.copy(tmp_path / "7.npz", ended / "checkpoint.npz")
    assert train.main([*fit, "--out", str(ended)]) == 0
    runs = [json.loads((out / "run.json").read_text()) for out in (whole, ended)]
    assert runs[0]["losses"] == runs[1]["losses"]
    # Zero weights in front of the loss: all 64 bins are alike at first.
    assert runs[0]["losses"][0] == pytest.approx(np.log(64), rel=1e-6)
    assert np.mean(runs[0]["losses"][-2:]) < 0.93 * np.log(64)

    assert train.main([*fit, "--out", str(ended), "--seed", "1"]) == 2
    assert "begun with seed 0" in capsys.readouterr().err
    files = [str(out / "run.json") for out in (whole, ended)]
    assert train.main(["plot", *files, "--out", str(tmp_path / "curves.png")]) == 0
    assert "from the first run 0.0000" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 1000
