"""The benchmark of ColabFold's trunk: its machinery on a stand-in, and the trunk itself traced."""

import json
import types

import haiku_hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genie_tk_jax import cli
from genie_tk_jax.bench import alphafold_report, design, timing, trunk

LIMIT = 2**21
TINY = ["--sizes", "8", "--blocks", "1,2", "--msa", "2", "--repeats", "1"]


def stand_in(name, dtype):
    """A block of few operations; one contestant is missing and another one is wrong."""
    if name == trunk.KERNELS:
        raise ImportError("no module named colabfold_kernels")

    def init(key, msa, z, valid):
        return {"layer": {"weights": jnp.ones((z.shape[-1], z.shape[-1]))}}

    def apply(params, key, msa, z, valid):
        weights = params["layer"]["weights"].astype(dtype)
        z = z + jnp.sin(z @ weights) * (2 if name == trunk.STOCK else 1)
        return msa + jnp.sin(z).mean(), z

    return types.SimpleNamespace(init=init, apply=apply)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trunk, "_block", stand_in)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "HIDES_HOST", 0.0)
    for name, value in {"STEP": 4, "PROBES": (8, 16), "_limit": lambda options: LIMIT}.items():
        monkeypatch.setattr(design, name, value)
    trunk.step.cache_clear()
    yield
    trunk.step.cache_clear()


def test_a_run_and_its_table(tmp_path, capsys, quick):
    arguments = ["bench", "alphafold", *TINY, "--contestants", "unchunked,stock,genie"]
    arguments += ["--design-blocks", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1, "stock is wrong"
    found = json.loads((tmp_path / "alphafold.json").read_text())
    assert found["kind"] == "alphafold" and found["command"].endswith(" ".join(arguments))
    rows = {(row["blocks"], row["pass"], row["contestant"]): row for row in found["rows"]}
    assert set(rows) == {
        (blocks, which, name)
        for blocks in (1, 2)
        for which, name in (
            *(("fwd", name) for name in (trunk.STOCK, trunk.UNCHUNKED, trunk.GENIE)),
            *(("fwd+bwd", name) for name in (trunk.UNCHUNKED, trunk.GENIE)),
        )
    }
    for (blocks, which, name), row in rows.items():
        assert row["status"] == ("wrong" if name == trunk.STOCK else "ok"), row
        assert row["peak_bytes"] > row["temporary_bytes"] >= 0 and row["error"] > 0
        assert (row["gradient_error"] is not None) == (which == "fwd+bwd")
        assert (row["ran"] == []) == (name == trunk.GENIE and which == "fwd+bwd" and blocks == 1)
    longest = {row["contestant"]: row for row in found["longest"]}
    assert set(longest) == {trunk.UNCHUNKED, trunk.GENIE}
    for row in longest.values():
        assert row["status"] == "ok" and row["next_n"] - row["n"] == design.STEP
        assert row["peak_bytes"] <= LIMIT < row["next_bytes"]

    capsys.readouterr()
    assert cli.main(["bench", "table", str(tmp_path / "alphafold.json")]) == 0
    table = capsys.readouterr().out
    assert table.strip() == alphafold_report.markdown(found)
    assert "| 2 | fwd+bwd | 8 | " in table and f"{longest['genie']['n']} residues" in table


def test_what_does_not_run_is_a_row_with_its_reason(tmp_path, quick):
    arguments = ["bench", "alphafold", *TINY, "--contestants", "colabfold-kernels", "--no-design"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "alphafold.json").read_text())["rows"]
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("missing", "no module named colabfold_kernels")
    }


def test_a_run_ends_when_its_time_is_up(tmp_path, monkeypatch, quick):
    monkeypatch.setattr("genie_tk_jax.bench.alphafold.Compiler.check", out_of_time)
    arguments = ["bench", "alphafold", *TINY, "--contestants", "genie", "--out", str(tmp_path)]
    for only, statuses in (((), {"skipped"}), (("--only-design",), set())):
        assert cli.main([*arguments, *only]) == 0
        found = json.loads((tmp_path / "alphafold.json").read_text())
        assert {row["status"] for row in found["rows"]} == statuses
        assert [row["n"] for row in found["longest"]] == [None]
        table = alphafold_report.markdown(found)
        assert "none found" in table and ("| fwd |" in table) == bool(statuses)


def out_of_time(self):
    raise TimeoutError("the time is up")


@pytest.mark.parametrize("cubic", [0, 60, 5000])
@pytest.mark.parametrize("limit", [3e9, 80e9, 1e12])
def test_the_search_is_short_and_exact(cubic, limit):
    def needed(n):
        return 8e6 + 5e4 * n**2 + cubic * n**3

    sizes = {}
    for tried, n in enumerate(design.search(sizes, limit), start=1):
        sizes[n] = needed(n)
        assert tried < 9, sizes
    fitting, too_large = design.bracket(sizes, limit)
    assert needed(fitting or 0) <= limit < needed(too_large)
    assert too_large - (fitting or 0) == design.STEP


@pytest.mark.parametrize("name", [trunk.STOCK, trunk.UNCHUNKED, trunk.GENIE])
def test_the_trunk_is_the_hosts(name):
    pytest.importorskip("haiku", reason="dm-haiku is not installed")
    haiku_hosts.stand_in_for_colabfold_kernels()
    pytest.importorskip("alphafold.model.modules", reason="AlphaFold 2 is not installed")
    shapes = trunk.shapes(2, 8, 3, "bfloat16")
    assert trunk.depth(shapes) == 2 and shapes.z.shape == (8, 8, 128)
    problem = trunk.pose(shapes, 0.25)
    assert problem.valid.tolist() == [1] * 6 + [0] * 2
    assert all(np.std(np.asarray(leaf)) > 0 for leaf in jax.tree.leaves(problem.params))
    ((msa, z),) = jax.eval_shape(trunk.step(name, "bfloat16", "fwd"), *shapes)
    assert (msa.shape, z.shape, z.dtype) == ((3, 8, 256), (8, 8, 128), jnp.bfloat16)
