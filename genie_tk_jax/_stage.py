"""A stage: the unit in which layers are computed, where a kernel stands beside its reference.

A stage is a function of `arrays`, a tuple of operands (or None) that all lead with a batch axis,
and `weights`, a pytree without one. Its results all lead with the batch axis too, gradients of
weights included, which the op sums. `stage` nests what each transformation needs:

    custom_vmap        folds a mapped axis into the batch, and calls the stage again;
    custom_partitioning  runs each device on its own shard, so pointwise stages never gather z;
    platform_dependent   takes the kernel on CUDA and the reference elsewhere.

Derivatives are the business of the op, whose custom_vjp calls a forward and a backward stage; a
stage itself refuses to be differentiated, and says what to do.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from genie_tk_jax import _dispatch, _operands

Arrays = tuple[jax.Array | None, ...]


class Kernel(NamedTuple):
    """A CUDA kernel for a stage: its call, and why it cannot serve some arguments, or None."""

    call: Callable[..., Any]
    unsupported: Callable[..., str | None]


class _Rule(NamedTuple):
    """The axes of each operand and result of a stage, a letter an axis."""

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    whole: tuple[str, ...]
    padded: tuple[str, ...]


def _parse(rule: str, whole: str, padded: str) -> _Rule:
    operands, results = (
        tuple(tuple(term.split()) for term in side.split(",")) for side in rule.split("->")
    )
    return _Rule(operands, results, tuple(whole.split()), tuple(padded.split()))


def stage(
    name: str,
    reference: Callable[..., Any],
    rule: str,
    *,
    whole: str,
    padded: str = "",
    fold: str = "b",
    kernel: Kernel | None = None,
) -> Callable[..., Any]:
    """Builds the stage `name(arrays, weights, *, implementation, **static)`.

    Args:
      reference: `reference(arrays, weights, **static)` in plain JAX, on any platform.
      rule: axes of operands and results, as in "b i k c, b i k -> b m i k". Results past those
        named are gradients of weights, [b, ...].
      whole: axes that a device needs whole. Others may be sharded; a result without a sharded
        axis is summed over its devices.
      padded: axes that some arrays hold rounded up to a multiple of `_operands.padding()`; each
        device's part of one is such a multiple, or whole.
      fold: the axis that takes a vmapped axis when all operands without it are unmapped.
      kernel: the CUDA kernel, if there is one.
    """
    parsed = _parse(rule, whole, padded)

    def refusal(arrays, weights, static) -> str | None:
        if kernel is None:
            return "this version has no CUDA kernel for it"
        return _dispatch.kernels_absent() or kernel.unsupported(arrays, weights, **static)

    def local(arrays, weights, static):
        default = functools.partial(reference, **static)
        cuda = default
        if kernel is not None and refusal(arrays, weights, static) is None:
            cuda = functools.partial(kernel.call, **static)
        return jax.lax.platform_dependent(arrays, weights, cuda=cuda, default=default)

    @functools.cache
    def nested(static_items: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        static = dict(static_items)

        @custom_vmap
        def mapped(arrays, weights):
            return _partitioned(lambda a, w: local(a, w, static), parsed, arrays, weights)

        @mapped.def_vmap
        def _(axis_size, in_batched, arrays, weights):
            return _fold(mapped, parsed, fold, axis_size, in_batched, arrays, weights)

        @jax.custom_jvp
        def underived(arrays, weights):
            return mapped(arrays, weights)

        @underived.defjvp
        def _(primals, tangents):
            raise NotImplementedError(
                f"{name} has no derivative of its own. Forward mode and second derivatives need "
                "implementation='xla', which is plain JAX."
            )

        return underived

    def call(arrays: Arrays, weights: Any, *, implementation: str | None = None, **static: Any):
        why = refusal(arrays, weights, static)
        _dispatch.choose(name, implementation, why, [x for x in arrays if x is not None])
        return nested(tuple(sorted(static.items())))(arrays, weights)

    return call


# vmap


def _fold(call, rule: _Rule, fold: str, axis_size: int, in_batched, arrays, weights):
    """Applies `call` to operands of which some lead with a mapped axis."""
    arrays_mapped, weights_mapped = in_batched
    if axis_size == 1:
        leaves, tree = jax.tree.flatten((arrays, weights))
        mapped = jax.tree.leaves(in_batched)
        squeezed = [x[0] if m else x for m, x in zip(mapped, leaves, strict=True)]
        results = jax.tree.map(lambda x: x[None], call(*tree.unflatten(squeezed)))
    elif any(jax.tree.leaves(weights_mapped)):
        results = _one_by_one(call, in_batched, arrays, weights)
    else:
        results = _into(call, rule, fold, axis_size, arrays_mapped, arrays, weights)
    return results, jax.tree.map(lambda _: True, results)


def _one_by_one(call, in_batched, arrays, weights):
    """Mapped weights: one call after the other, unmapped operands shared."""
    leaves, tree = jax.tree.flatten((arrays, weights))
    mapped = jax.tree.leaves(in_batched)

    def one(slices):
        given = iter(slices)
        filled = [next(given) if m else x for m, x in zip(mapped, leaves, strict=True)]
        return call(*tree.unflatten(filled))

    return jax.lax.map(one, [x for m, x in zip(mapped, leaves, strict=True) if m])


def _into(call, rule: _Rule, fold: str, axis_size: int, arrays_mapped, arrays, weights):
    """Folds the mapped axis into `fold` where every unfolded operand is unmapped, else into b."""
    unfolded = [m for m, axes in zip(arrays_mapped, rule.operands, strict=True) if fold not in axes]
    if any(jax.tree.leaves(unfolded)) or not all(fold in axes for axes in rule.results):
        fold = "b"

    def merged(m, x, axes):
        if x is None or fold not in axes:
            return x
        at = axes.index(fold)
        x = x if m else jnp.broadcast_to(x, (axis_size, *x.shape))
        x = jnp.moveaxis(x, 0, at)
        return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])

    def split(x, axes):
        at = axes.index(fold)
        x = x.reshape(*x.shape[:at], axis_size, x.shape[at] // axis_size, *x.shape[at + 1 :])
        return jnp.moveaxis(x, at, 0)

    results = call(tuple(map(merged, arrays_mapped, arrays, rule.operands)), weights)
    leaves, tree = jax.tree.flatten(results)
    return tree.unflatten(map(split, leaves, _padded(rule, leaves)))


def _padded(rule: _Rule, results: list) -> list[tuple[str, ...]]:
    """The axes of every result: those named, then gradients of weights, of which b is known."""
    return [*rule.results, *[("b",)] * (len(results) - len(rule.results))]


# Sharding


def _partitioned(function, rule: _Rule, arrays: Arrays, weights):
    """Calls `function` so that each device works on its shard of the axes that may be sharded."""
    operands, tree = jax.tree.flatten((arrays, weights))
    results, result_tree = jax.tree.flatten(jax.eval_shape(function, arrays, weights))
    present = [axes for axes, x in zip(rule.operands, arrays, strict=True) if x is not None]
    operand_axes = [*present, *[()] * (len(operands) - len(present))]
    operand_axes, result_axes = _of_one_size(
        operands, operand_axes, results, _padded(rule, results)
    )

    @custom_partitioning
    def call(*flat):
        return tuple(jax.tree.leaves(function(*tree.unflatten(flat))))

    def partition(mesh, arg_shapes, result_shapes):
        every = zip([*operand_axes, *result_axes], [*arg_shapes, *result_shapes], strict=True)
        shards = _shards(mesh, every, rule)

        def placed(axes):
            return NamedSharding(mesh, PartitionSpec(*(shards.get(axis) for axis in axes)))

        def per_device(*flat):
            found = jax.tree.leaves(function(*tree.unflatten(flat)))
            return tuple(
                _summed(x, [name for axis in shards if axis not in axes for name in shards[axis]])
                for x, axes in zip(found, result_axes, strict=True)
            )

        return mesh, per_device, tuple(map(placed, result_axes)), tuple(map(placed, operand_axes))

    left, right = _named(operands, operand_axes, "w"), _named(results, result_axes, "g")
    call.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, args, results: partition(mesh, args, results)[2],
        sharding_rule=f"{_written(left)} -> {_written(right)}",
        need_replication_factors=_whole_axes(rule, [*left, *right]),
    )
    return result_tree.unflatten(call(*operands))


def _summed(x: jax.Array, mesh_axes: list[str]) -> jax.Array:
    return jax.lax.psum(x, tuple(mesh_axes)) if mesh_axes else x


def _of_one_size(operands, operand_axes, results, result_axes):
    """The axes, with those renamed apart that have one size here and its rounded-up size there."""
    arrays, axes_of = [*operands, *results], [*operand_axes, *result_axes]
    sizes: dict[str, set[int]] = {}
    for x, axes in zip(arrays, axes_of, strict=True):
        for axis, size in zip(axes, x.shape, strict=False):
            sizes.setdefault(axis, set()).add(size)
    renamed = [
        tuple(f"{axis}{n}" if len(sizes[axis]) > 1 else axis for axis in axes)
        for n, axes in enumerate(axes_of)
    ]
    return renamed[: len(operands)], renamed[len(operands) :]


def _shards(mesh, every, rule: _Rule) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each axis of the rule is sharded over: those of the first array with any.

    Args:
      every: pairs of an array's axes and its shape with sharding, operands first.
    """
    known = {axis for axes in (*rule.operands, *rule.results) for axis in axes} - {*rule.whole}
    shards: dict[str, tuple[str, ...]] = {}
    padding = _operands.padding()
    for axes, shape in every:
        entries = () if shape.sharding is None else shape.sharding.spec
        for axis, entry, size in zip(axes, entries, shape.shape, strict=False):
            names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            used = {name for taken in shards.values() for name in taken}
            parts = math.prod(mesh.shape[name] for name in names)
            divides = size % (parts * (padding if axis in rule.padded else 1)) == 0
            if names and divides and axis in known - {*shards} and used.isdisjoint(names):
                shards[axis] = names
    return shards


def _named(arrays, known_axes, prefix: str) -> list[tuple[str, ...]]:
    """Axis names for every axis of every array; those of weights get names of their own."""
    return [
        (*axes, *(f"{prefix}{n}_{i}" for i in range(len(axes), len(x.shape))))
        for n, (x, axes) in enumerate(zip(arrays, known_axes, strict=True))
    ]


def _written(terms: list[tuple[str, ...]]) -> str:
    return ", ".join(" ".join(axes) for axes in terms)


def _whole_axes(rule: _Rule, terms: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The axes that must not be sharded: those the rule says, and all axes of weights."""
    known = {axis for axes in (*rule.operands, *rule.results) for axis in axes}
    every = dict.fromkeys(axis for axes in terms for axis in axes)
    return tuple(axis for axis in every if axis in rule.whole or axis not in known)
