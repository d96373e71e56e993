"""What the GPU tests share: problems, steps that compile once for a shape, and the yardstick.

A kernel passes if its error against float64 is at most 1.05 times that of plain XLA in the same
dtype, in the median of five seeds, for results and every gradient.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genie_tk_jax

SEEDS = range(5)
ALLOWED = 1.05
PAIR_AXES = {"z": -3, "a": -2, "b": -2, "t": -2, "q": -4, "k": -4, "v": -4, "bias": -2}
"""The first of the two pair axes of each input."""

Op = Callable[..., Any]
"""`op(inputs, mask, implementation=None)`, the inputs a dict by argument name."""


class Problem(NamedTuple):
    """One call: what is differentiated, the mask or None, and cotangents of the results."""

    inputs: dict[str, Any]
    mask: Any
    cotangents: Any


def layer(name: str, **how: Any) -> Op:
    """The layer `name` as an `Op`."""

    def call(inputs, mask, implementation=None):
        function = getattr(genie_tk_jax, name)
        return function(inputs["z"], mask, inputs["params"], **how, implementation=implementation)

    return call


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def problem(op: Op, seed: int, inputs: dict[str, Any], mask: Any) -> Problem:
    """The call of `op` on these inputs, with random cotangents."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(op, inputs, mask))
    drawn = [normal(seed + index, x.shape, x.dtype) for index, x in enumerate(leaves, 1000)]
    return Problem(inputs, mask, tree.unflatten(drawn))


@functools.cache
def forward(op: Op) -> Callable[..., Any]:
    """Compiled `(inputs, mask) -> results`."""
    return jax.jit(op)


@functools.cache
def step(op: Op, implementation: str | None = None) -> Callable[..., Any]:
    """Compiled `(inputs, mask, cotangents) -> results, gradients`."""

    @jax.jit
    def run(inputs, mask, cotangents):
        results, pull = jax.vjp(lambda x: op(x, mask, implementation=implementation), inputs)
        return results, *pull(cotangents)

    return run


def exact(op: Op, given: Problem) -> Any:
    """Results and gradients in float64."""
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (given.inputs, given.cotangents)
        )
        return jax.device_get(step(op, "xla")(inputs, given.mask, cotangents))


def hidden(given: Problem) -> np.ndarray:
    """Every other masked pair, bool, shaped to select from z."""
    where = ~np.asarray(given.mask)
    where[..., ::2] = False
    return where[..., None]


def reading(given: Problem, value: float) -> Problem:
    """The problem with `value` for z in the hidden pairs."""
    z = jnp.where(hidden(given), value, given.inputs["z"])
    return given._replace(inputs={**given.inputs, "z": z})


def assert_as_exact_as_xla(op: Op, problems: Sequence[Problem]) -> None:
    """Holds each result and gradient to the yardstick, over problems that differ by their seed.

    Where a problem has z and a mask, z is NaN in half of the masked pairs: it reads as zeros there
    and has a gradient of zero.
    """
    errors: list[dict[str, tuple[float, float]]] = []
    for given in problems:
        garbage = "z" in given.inputs and given.mask is not None
        clean = reading(given, 0) if garbage else given
        found = jax.device_get(step(op)(*(reading(given, jnp.nan) if garbage else given)))
        plain, truth = jax.device_get(step(op, "xla")(*clean)), exact(op, clean)
        if garbage:
            for _, gradients in (plain, truth):
                gradients["z"] = np.where(hidden(given), 0, gradients["z"])
        errors.append(_errors(found, plain, truth))
    worse = {}
    for name, size in errors[0]:
        ratios = [ours / max(theirs, 1e-300) for ours, theirs in (x[name, size] for x in errors)]
        # The error of a leaf of few numbers scatters by chance.
        if not np.median(ratios) <= ALLOWED * (1 + 2 / math.sqrt(size)):
            worse[name] = [round(float(ratio), 2) for ratio in ratios]
    assert not worse, f"errors as multiples of plain XLA's: {worse}"


def _errors(found: Any, plain: Any, truth: Any) -> dict[tuple[str, int], tuple[float, float]]:
    """For each leaf, by name and size, the distances of `found` and `plain` from the truth."""
    named, _ = jax.tree_util.tree_flatten_with_path(truth)
    leaves = [jax.tree.leaves(x) for x in (found, plain)]
    errors = {}
    for (path, true), ours, theirs in zip(named, *leaves, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        off = [float(np.linalg.norm(x.astype(np.float64) - true)) for x in (ours, theirs)]
        errors[jax.tree_util.keystr(path), true.size] = (off[0], off[1])
    return errors


def assert_same_bits(found: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_padding_changes_nothing(op: Op, given: Problem, crop: Callable[..., Any]) -> None:
    """Forward results have the same bits when masked rows and columns follow.

    Args:
      crop: of a result with more pairs, the part that counts, for a bool array of pairs too.
    """
    for choice in genie_tk_jax.explain(op, given.inputs, given.mask):
        if choice.implementation != "cuda":
            pytest.skip(f"only kernels promise this, and XLA runs {choice.op}: {choice.reason}")
    rows, columns = given.mask.shape[-2:]
    longer = (129 - rows, 129 - columns)

    def pad(x, axis, seed):
        widths = [(0, 0)] * x.ndim
        widths[axis], widths[axis + 1] = ((0, extra) for extra in longer)
        beyond = np.pad(np.zeros(x.shape, bool), widths, constant_values=True)
        return jnp.where(beyond, normal(seed, beyond.shape, x.dtype), jnp.pad(x, widths))

    inputs = {
        name: pad(x, PAIR_AXES[name], seed) if name in PAIR_AXES else x
        for seed, (name, x) in enumerate(given.inputs.items())
    }
    mask = np.pad(given.mask, [(0, extra) for extra in longer])
    short, long = forward(op)(given.inputs, given.mask), forward(op)(inputs, mask)
    assert_same_bits(jax.tree.map(crop, long), jax.tree.map(crop, short))
