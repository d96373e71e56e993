"""The benchmark on the CPU at tiny sizes: who takes part, who is caught, what is told."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_options import SIZES, hurry, options

from genie_tk_jax import cli
from genie_tk_jax.bench import contestants, judge, peers, report, run, timing, workloads
from genie_tk_jax.bench.contestants import Contestant
from genie_tk_jax.bench.workloads import WORKLOADS

TINY = ["--sizes", "8", "--channels", "16", "--heads", "2", "--repeats", "1"]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture
def compiled_quickly():
    """Most of the time here is XLA's, which has more programs to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def read(out):
    return json.loads((out / "results.json").read_text())


def test_every_workload_runs_and_the_report_is_whole(tmp_path, capsys, compiled_quickly):
    arguments = ["bench", *TINY, "--peers", "none", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    found = read(tmp_path)
    assert found["schema"] == 1 and found["command"].endswith(" ".join(arguments))
    assert {"genie_tk_jax", "python", "jax", "jaxlib"} <= set(found["versions"])
    assert set(found["device"]) == {"name", "count", "driver"} and found["date"].endswith("+00:00")
    assert found["options"]["masked"] == 0.1 and found["ceiling"] is None
    expected = set()
    for workload in WORKLOADS.values():
        names = ["xla", "genie"] + ["reference"] * (workload.plain is not None)
        expected |= {(workload.name, which, name) for which in workload.passes for name in names}
    rows = found["rows"]
    assert {(row["workload"], row["pass"], row["contestant"]) for row in rows} == expected
    assert len({frozenset(row) for row in rows}) == 1, "every row has every key"
    for row in rows:
        assert row["status"] == "ok" and row["ms_min"] <= row["ms"] <= row["ms_max"], row
        assert 0 <= row["error"] < 0.02 and row["temporary_bytes"] >= 0 and row["calls"] >= 1
        assert (row["gradient_error"] is not None) == (row["pass"] == "fwd+bwd")
        assert (row["ran"] is not None) == (row["contestant"] == "genie")
    printed = capsys.readouterr().out
    assert "multiplication_outgoing" in printed
    pytest.importorskip("matplotlib")
    for what in ("time", "speed-up", "roofline"):
        assert (tmp_path / f"{what}-cpu-bfloat16-16-2-0.1.png").stat().st_size > 10_000


@pytest.mark.parametrize("workload", ["multiplication_incoming", "attention_ending"])
def test_a_wrong_contestant_is_caught_and_not_timed(workload, monkeypatch):
    """One that computes the other direction or node, as a careless adapter would."""
    other = {"multiplication_incoming": "multiplication_outgoing"}
    swapped = WORKLOADS[other.get(workload, "attention_starting")]

    def build(name, workload, sizes, dtype):
        return Contestant(name, swapped.plain)

    careless = peers.Peer((WORKLOADS[workload].kind,), (), build)
    monkeypatch.setitem(peers.PEERS, "careless", careless)
    chosen = options(workloads=(workload,), passes=("fwd",), peers=("careless",))
    rows = {row["contestant"]: row for row in run._rows(chosen)}
    assert rows["careless"]["status"] == "wrong" and rows["careless"]["ms"] is None
    assert rows["careless"]["error"] > 0.1 and "outputs" in rows["careless"]["reason"]
    assert rows["genie"]["status"] == "ok" and not run.failed(list(rows.values()))


def test_a_wrong_gradient_is_caught():
    workload = WORKLOADS["contract_outgoing"]
    problem = workloads.pose(workload, SIZES, "float32", 0.1)
    truth = judge.truth_of(workload, problem, "fwd+bwd", "float32")

    @jax.custom_vjp
    def call(inputs):
        return workload.ours(inputs, None, "xla")

    call.defvjp(lambda x: (call(x), x), lambda x, d: (jax.tree.map(jnp.ones_like, x),))
    verdict = judge.judge(
        lambda: Contestant("careless", lambda inputs, mask: call(inputs)),
        problem,
        "fwd+bwd",
        truth,
        yardstick=[1e-7, 1e-7],
        repeats=1,
    )
    assert verdict.status == "wrong" and "gradients" in verdict.reason
    assert verdict.fields["error"] < 1e-6 and "ms" not in verdict.fields


def test_nan_is_wrong_and_null_in_the_report():
    assert judge.too_far([float("nan")], [1e-3]) and judge.too_far([float("nan")], None)
    assert not judge.too_far([2e-3], [1e-3]) and judge.too_far([4e-3], [1e-3])
    assert run.finite(float("nan")) is None and run.finite(0.5) == 0.5


def test_what_does_not_run_is_a_row_with_its_reason(tmp_path, monkeypatch):
    """A library that is missing, one that refuses, one that runs out of memory."""

    def raising(error):
        def build(name, workload, sizes, dtype):
            def call(inputs, mask):
                raise error

            return Contestant(name, call)

        return build

    for name, build in {
        "refuses": raising(NotImplementedError("no such head")),
        "full": raising(RuntimeError("RESOURCE_EXHAUSTED: out of device memory")),
    }.items():
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(("contract",), (), build))
    tokamax = peers.PEERS["tokamax"]._replace(kinds=("contract",))
    monkeypatch.setitem(peers.PEERS, "tokamax", tokamax)
    monkeypatch.setitem(sys.modules, "tokamax", None)  # as if it were not installed
    chosen = options(peers=("tokamax", "refuses", "full"), passes=("fwd",))
    told = []
    found = run.bench(chosen, tmp_path, ["bench"], told.append)
    assert read(tmp_path)["rows"] == found["rows"] == told
    rows = {row["contestant"]: row for row in told}
    assert [rows[name]["status"] for name in ("xla", "genie")] == ["ok", "ok"]
    assert rows["tokamax"]["status"] == "missing" and "tokamax" in rows["tokamax"]["reason"]
    assert rows["refuses"]["reason"] == "NotImplementedError: no such head"
    assert rows["refuses"]["status"] == "refused" and rows["full"]["status"] == "out of memory"
    assert all(rows[name]["ms"] is None for name in ("tokamax", "refuses", "full"))
    assert "missing: " in report.line(rows["tokamax"])


def test_what_cannot_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(timing, "_memory_left", lambda: 1000)
    with pytest.raises(MemoryError, match="GiB are left"):
        timing.compiled(lambda x: x @ x, (jnp.ones((64, 64)),))
    (row,) = run._rows(options(passes=("fwd",)))
    assert row["contestant"] == "genie" and row["status"] == "out of memory"
    assert row["reason"].startswith("nothing to judge by in float32: needs ") and run.failed([row])


def test_masks_leave_no_row_or_column_empty():
    mask = np.asarray(workloads.pose(WORKLOADS["contract_outgoing"], SIZES, "float32", 0.9).mask)
    assert mask.any(0).all() and mask.any(1).all() and mask.mean() < 0.5


def test_gradients_come_back_through_an_adapter():
    """An adapter that transposes inputs and outputs agrees with the contestant it wraps."""
    workload = WORKLOADS["contract_incoming"]
    problem = workloads.pose(workload, SIZES, "float32", 0.1)
    truth = judge.truth_of(workload, problem, "fwd+bwd", "float32")

    def turned(tree):
        return jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), tree)

    def call(inputs, mask):
        return jnp.swapaxes(workload.ours(turned(inputs), None, "xla"), -1, -2)

    odd = Contestant("turned", call, inputs=turned, output=turned)
    attempt = contestants.trial(odd, problem, "fwd+bwd", truth.cotangents)
    found = attempt.ours(jax.jit(attempt.step)(*attempt.operands))
    assert all(judge.distance(x, y) < 1e-6 for x, y in zip(found, truth.results, strict=True))


def made_up(date, **rows):
    """A report of one problem with invented figures, to test the making of tables alone."""
    blank = {"status": "ok", "reason": "", "error": 0.01, "gradient_error": None, "ran": None}
    blank |= {"workload": "attention_core", "kind": "attention_core", "pass": "fwd", "n": 64}
    blank |= {"dtype": "bfloat16", "channels": 128, "heads": 4, "masked": 0.1}
    blank |= {"temporary_bytes": 2**20, "flops_share": 0.5, "bytes_share": 0.25}
    device = {"name": "a card", "count": 1, "driver": "1.2"}
    found = [{**blank, "contestant": name, **row} for name, row in rows.items()]
    about = {"date": date, "device": device, "ceiling": None, "versions": {"jax": "9"}}
    return about | {"rows": found}


def test_the_table_sets_us_against_the_best_and_the_leanest(tmp_path, capsys):
    ran = [{"implementation": "cuda"}, {"implementation": "xla"}]
    old = made_up("2026-01-01T00:00:00+00:00", genie={"ms": 9.0}, cudnn={"ms": 6.0})
    new = made_up(
        "2026-01-02T00:00:00+00:00",
        genie={"ms": 2.0, "ran": ran, "error": 0.005},
        xla={"ms": None, "status": "out of memory"},
        reference={"ms": 1.0},
        lean={"ms": 8.0, "temporary_bytes": 0},
    )
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path, made in zip(paths, (new, old), strict=True):
        path.write_text(json.dumps(made))
    assert cli.main(["bench", "table", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    cells = [cell.strip() for cell in printed.strip().splitlines()[-1].strip("|").split("|")]
    expected = ["attention_core", "fwd", "64", "2", "1 of 2", "50%", "out of memory"]
    assert cells == [*expected, "6 cudnn", "3.00", "1.0", "0.0 lean", "0.50"]
    assert "a card, driver 1.2, 2026-01-02: jax 9." in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workloads", "attention"], "'attention' is none of"),
        (["--sizes", "8,x"], "expected a number from 1; got 'x'"),
        (["--masked", "1"], "from 0 to below 1"),
        (["--peers", "jax"], "'jax' is none of"),
    ],
)
def test_refused_options_say_what_would_do(arguments, words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert words in capsys.readouterr().err


def test_heads_have_to_divide_the_channels(capsys):
    assert cli.main(["bench", "--channels", "16", "--heads", "3"]) == 2
    assert "--heads 3 does not divide --channels 16" in capsys.readouterr().out
