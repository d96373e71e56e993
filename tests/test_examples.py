"""The examples run, at small sizes and without parameters of real models."""

import importlib.util
import re
import sys
from pathlib import Path

import haiku_hosts
import jax
import numpy as np
import pytest

from genie_tk_jax import convert

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name, monkeypatch):
    """The example as a module; run where XLA's settings can still be given, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
