"""Who takes part, and how inputs, outputs and gradients pass between their layouts and ours."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from genie_tk_jax.bench.workloads import Problem, Workload

LIBRARY, PLAIN, REFERENCE = "genie", "xla", "reference"


def _same(x: Any) -> Any:
    return x


class Contestant(NamedTuple):
    """One way to compute a workload.

    call(inputs, mask): what is timed, on operands as this contestant wants them.
    inputs, mask: bring our operands into that form, once and outside of the timing.
    output: brings its result into our form; linear.
    """

    name: str
    call: Callable[[Any, Any], Any]
    inputs: Callable[[Any], Any] = _same
    mask: Callable[[jax.Array], Any] = _same
    output: Callable[[Any], Any] = _same


def own(workload: Workload) -> list[Contestant]:
    """XLA as a user would write it, our XLA reference where that differs, and this library."""
    reference = partial(workload.ours, implementation="xla")
    found = [Contestant(PLAIN, workload.plain or reference)]
    if workload.plain:
        found.append(Contestant(REFERENCE, reference))
    return [*found, Contestant(LIBRARY, partial(workload.ours, implementation=None))]


class Trial(NamedTuple):
    """A contestant on a problem: step(*operands) is the call that is timed.

    ours(results) gives outputs, and gradients after a backward pass, in our form.
    """

    step: Callable[..., Any]
    operands: tuple[Any, ...]
    ours: Callable[[Any], tuple[Any, ...]]


def trial(contestant: Contestant, problem: Problem, which: str, cotangents: Any) -> Trial:
    """Sets `contestant` before `problem`, for the pass `which`.

    Args:
      cotangents: of our outputs, in our form; used by the pass "fwd+bwd" alone.
    """
    inputs, mask = contestant.inputs(problem.inputs), contestant.mask(problem.mask)
    if which == "fwd":
        return Trial(contestant.call, (inputs, mask), lambda out: (contestant.output(out),))

    result = jax.eval_shape(contestant.call, inputs, mask)
    ours = jax.eval_shape(contestant.output, result)
    cotangents = jax.tree.map(lambda c, like: c.astype(like.dtype), cotangents, ours)
    (theirs,) = jax.linear_transpose(contestant.output, result)(cotangents)

    def step(inputs, mask, cotangents):
        out, pull = jax.vjp(lambda inputs: contestant.call(inputs, mask), inputs)
        return out, *pull(cotangents)

    def in_our_form(results):
        out, gradients = results
        # The chain rule through the adapter brings the gradients to our inputs.
        _, pull = jax.vjp(contestant.inputs, problem.inputs)
        return contestant.output(out), *pull(gradients)

    return Trial(step, (inputs, mask, theirs), in_our_form)
