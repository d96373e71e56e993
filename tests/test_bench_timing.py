"""The benchmark's timing, its programs compiled ahead, and what it counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_options import hurry, options

from genie_tk_jax.bench import ahead, costs, judge, run, timing


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    hurry(monkeypatch)


def test_what_is_faster_than_the_card_was_not_run(monkeypatch):
    name = jax.devices()[0].device_kind
    monkeypatch.setitem(costs.CEILINGS, name, costs.Ceiling(1e9, 1e9))
    slow, fast = (
        run._against_ceiling(judge.Verdict("ok", "", {"ms": ms}), 1e6, 5e5) for ms in (2.0, 0.5)
    )
    assert slow[0].status == "ok" and slow[1] == {"flops_share": 0.5, "bytes_share": 0.25}
    assert fast[0].status == "wrong" and fast[0].fields["ms"] is None


@pytest.mark.parametrize("n", [160, pytest.param(2048, marks=pytest.mark.gpu)])
def test_the_loop_runs_every_turn_and_returns_the_result(n):
    """XLA must not hoist a call whose operands do not change: time grows with the turns."""
    x = jnp.ones((n, n))

    def step(x):
        return jnp.tanh(x @ x @ x)

    one, many = (jax.jit(timing.looped(step, turns)) for turns in (10, 200))
    np.testing.assert_allclose(many(x)[1], step(x), rtol=1e-6)
    assert int(many(x)[0]) == 200
    one(x)
    least = [min(timing._seconds(lambda f=f: f(x), 1) for _ in range(5)) for f in (one, many)]
    assert least[1] > 5 * least[0]


def test_programs_compiled_ahead_are_those_that_run(tmp_path, monkeypatch):
    """The run finds every step and truth in the cache, so their compiled programs are few."""
    missed = []

    def listen(event, **_):
        missed.append(event == "/jax/compilation_cache/cache_misses")

    def rows_then_misses(jobs, **_):
        missed.clear()
        monkeypatch.setattr(ahead, "compile_all", lambda tasks, jobs: compile_all(tasks, jobs))
        rows = run.bench(options(jobs=jobs), tmp_path, [], lambda row: None)["rows"]
        return [row["status"] for row in rows], sum(missed)

    def compile_all(tasks, jobs):
        found(tasks, jobs)
        missed.clear()

    found = ahead.compile_all
    jax.monitoring.register_event_listener(listen)
    try:
        jax.clear_caches()
        plain, without = rows_then_misses(1)
        jax.clear_caches()
        ahead_of_it, with_it = rows_then_misses(2)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert plain == ahead_of_it == ["ok"] * len(plain)
    assert with_it <= without - 5  # two passes of the library and of XLA, and the truth


def test_short_calls_are_timed_in_the_loop_too(monkeypatch):
    monkeypatch.setattr(timing, "HIDES_HOST", 10.0)
    x = jnp.ones((4, 4))
    found = timing.timed(jax.jit(jnp.sin), jnp.sin, (x,), 2)
    assert found.method in ("calls", "loop") and found.samples == 2 and found.ms > 0


def test_counts_by_hand():
    """N = 4, 8 channels, 2 heads of 4: sums over the products as one would draw them."""
    sizes = costs.Sizes(4, 8, 2)
    # 16 pairs: 8 -> 32 numbers each (a, b and their gates), then 8 products [4, 4] x [4, 4].
    assert costs.counted("gated_projection", sizes, "fwd", 2) == (2 * 16 * 8 * 32, 2 * 16 * 24)
    assert costs.counted("contract", sizes, "fwd", 2) == (2 * 8 * 4 * 4 * 4, 2 * 16 * 24)
    assert costs.counted("gated_output", sizes, "fwd", 2) == (2 * 16 * (64 + 64), 2 * 16 * 24)
    # z once and t, a, b both ways; backward twice the products, 15 channels' worth of numbers.
    assert costs.counted("multiplication", sizes, "fwd", 2) == (8192 + 1024 + 4096, 2 * 16 * 72)
    forward_and_back = (3 * (8192 + 1024 + 4096), 2 * 16 * (72 + 120))
    assert costs.counted("multiplication", sizes, "fwd+bwd", 2) == forward_and_back
    # q k^T and P v for 4 rows and 2 heads; five such products in the backward pass.
    core = 2 * (2 * 4 * 2 * 4 * 4 * 4)
    assert costs.counted("attention_core", sizes, "fwd", 4) == (core, 4 * 16 * (32 + 2))
    both = costs.counted("attention_core", sizes, "fwd+bwd", 4)
    assert both == (3.5 * core, 4 * 16 * (32 + 2 + 64 + 4))
    # q, k, v, the bias; the gate and the output.
    linear = 2 * 16 * 8 * (24 + 2) + 2 * 16 * (64 + 64)
    assert costs.counted("attention", sizes, "fwd", 2)[0] == core + linear
    # The figures that the kernels are designed against: 0.48 T and 2.4 GB at N = 1,024.
    flops, moved = costs.counted("multiplication", costs.Sizes(1024, 128, 4), "fwd", 2)
    assert round(flops / 1e12, 2) == 0.48 and round(moved / 1e9, 1) == 2.4
