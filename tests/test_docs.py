"""Documents hold what they say: code that runs, and tables made from the results beside them."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from draw import mask, pair
from scripts import load
from test_convert_files import checkpoint

from genie_tk_jax import convert

ROOT = Path(__file__).parents[1]
SCOPE = "pairformer_module.layers.0.tri_mul_out"


@pytest.mark.parametrize("document", ["README.md", "docs/speed.md"])
def test_tables_are_those_of_the_results(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "<!-- bench table " in text
    assert load(ROOT / "benchmarks" / "tables.py").filled(text) == text


def code(heading):
    """The Python under a heading of docs/hosts.md."""
    text = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.search("```python\n(.*?)```", section, re.DOTALL)[1]


def test_code_runs(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would; on a checkpoint of Boltz's names, 8 channels wide."""
    monkeypatch.chdir(tmp_path)
    convert.write("model.npz", checkpoint("boltz"))
    found = {"z": pair(1, 5, 8), "mask": jnp.asarray(mask(2, 5)), "scope": SCOPE}
    for heading in ("A checkpoint of another model", "Flax"):
        text = code(heading).replace("model.safetensors", "model.npz").replace("128, 128", "8, 8")
        exec(text, found)
    assert found["layers"].keys() >= {SCOPE} and found["update"].shape == (5, 5, 8)
    np.testing.assert_allclose(
        found["multiply"](found["z"], found["mask"]), found["update"], rtol=1e-5, atol=1e-6
    )
    exec(code("Calls of cuequivariance_jax or tokamax"), {})
    exec(code("Which implementation ran"), found)
    assert "gated_projection: " in capsys.readouterr().out
