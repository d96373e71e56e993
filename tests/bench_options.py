"""The smallest run of the benchmark, as the tests of it ask for."""

from genie_tk_jax.bench import costs, run, timing

SIZES = costs.Sizes(8, 16, 2)


def options(**changes):
    one = run.Options(
        ("contract_incoming",),
        costs.PASSES,
        (8,),
        ("float32",),
        16,
        2,
        (),
        repeats=1,
        masked=0.1,
        jobs=1,
    )
    return one._replace(**changes)


def hurry(monkeypatch):
    """Samples of a millisecond, and no second program for the loop."""
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "HIDES_HOST", 0.0)
