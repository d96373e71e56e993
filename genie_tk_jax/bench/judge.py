"""Judges a contestant against float32, then times it; whatever it does, the answer is a row."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax import explain
from genie_tk_jax.bench.contestants import LIBRARY, Contestant, Trial, trial
from genie_tk_jax.bench.timing import UNTUNED, compiled, temporary_bytes, timed
from genie_tk_jax.bench.workloads import Problem, Workload

# A contestant is wrong if its error is more than this multiple of the plain XLA layer's at the same
# dtype. What rounds alike lies within 1.5; a wrong epsilon, mask or operand far beyond.
WRONG = 3.0
# Errors below this are float32's own rounding.
NEGLIGIBLE = 1e-6


class Truth(NamedTuple):
    """Results in float32 with the highest matmul precision: outputs, then gradients if asked for.

    cotangents: random, in our form, those of the outputs.
    """

    cotangents: Any
    results: tuple[Any, ...]


def truth_of(workload: Workload, problem: Problem, which: str, dtype: str) -> Truth:
    """The truth for a problem whose inputs are rounded to `dtype` already."""
    wide, contestant = problem.widened(), exact(workload)
    with jax.default_matmul_precision("highest"):
        cotangents = cotangents_of(workload, problem, dtype)
        attempt = trial(contestant, wide, which, cotangents)
        program = compiled(attempt.step, attempt.operands, UNTUNED)
        return Truth(cotangents, attempt.ours(program(*attempt.operands)))


def exact(workload: Workload) -> Contestant:
    """What gives the truth: our reference, to be run in float32 at the highest precision."""
    return Contestant("float32", partial(workload.ours, implementation="xla"))


def cotangents_of(workload: Workload, problem: Problem, dtype: str) -> Any:
    """Random cotangents of the workload's outputs, in our form."""
    return _random_like(jax.eval_shape(exact(workload).call, *problem), dtype)


def _random_like(shapes: Any, dtype: str) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return tree.unflatten([jax.random.normal(key, x.shape).astype(dtype) for key, x in pairs])


@jax.jit
def distance(found: Any, truth: Any) -> jax.Array:
    """||found - truth|| / ||truth|| over all leaves together."""
    leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True))
    error = sum(jnp.sum(jnp.square(x.astype(jnp.float32) - y)) for x, y in leaves)
    return jnp.sqrt(error / sum(jnp.sum(jnp.square(y)) for _, y in leaves))


class Verdict(NamedTuple):
    """What came of one contestant on one problem.

    status: "ok"; "wrong", not timed; "missing"; "refused"; "out of memory".
    reason: why it is not "ok", else empty.
    fields: what else was found out, by the names of a row.
    """

    status: str
    reason: str
    fields: dict[str, Any]


def judge(
    build: Callable[[], Contestant],
    problem: Problem,
    which: str,
    truth: Truth,
    *,
    yardstick: list[float] | None,
    repeats: int,
) -> Verdict:
    """Builds a contestant, measures its errors and, if they are in order, times it.

    Args:
      yardstick: the plain XLA layer's errors of outputs and gradients, or None for that itself.
    """
    fields: dict[str, Any] = {}
    # Peers raise whatever they like, from tracing to running, and none of it may end the run.
    try:
        contestant = build()
        attempt = trial(contestant, problem, which, truth.cotangents)
        program = compiled(attempt.step, attempt.operands)
        errors = _errors(attempt, program, truth)
        fields |= zip(("error", "gradient_error"), errors, strict=False)
        fields["temporary_bytes"] = temporary_bytes(program)
        if contestant.name == LIBRARY:
            fields["ran"] = [x._asdict() for x in explain(attempt.step, *attempt.operands)]
        if reason := too_far(errors, yardstick):
            return Verdict("wrong", reason, fields)
        found = timed(program, attempt.step, attempt.operands, repeats)
        return Verdict("ok", "", fields | found._asdict())
    except Exception as error:
        return Verdict(*failure(error), fields)


def _errors(attempt: Trial, program: Any, truth: Truth) -> list[float]:
    """Of the outputs and, after a backward pass, of all gradients together."""
    results = attempt.ours(program(*attempt.operands))
    return [float(distance(x, y)) for x, y in zip(results, truth.results, strict=False)]


def too_far(errors: list[float], yardstick: list[float] | None) -> str:
    """Why a contestant with these errors is wrong, or nothing."""
    limits = [max(WRONG * x, NEGLIGIBLE) for x in yardstick or [float("inf")] * len(errors)]
    for name, error, limit in zip(("outputs", "gradients"), errors, limits, strict=False):
        if not error <= limit:  # NaN is wrong too.
            return f"error of the {name} is {error:.1e}; {limit:.1e} is allowed"
    return ""


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a call that raised."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ImportError):
        return "missing", text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "out of memory", text
    return "refused", f"{type(error).__name__}: {text}"
