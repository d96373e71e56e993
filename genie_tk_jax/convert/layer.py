"""One layer's parameters between a host's layout and the canonical tree.

A conversion only reshapes, transposes, flips, stacks and picks, on the trailing axes: values and
dtypes stay bit for bit, leading axes of a layer stack stay where they are, NumPy stays NumPy, and
traced arrays are fine.
"""

import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genie_tk_jax.convert import hosts
from genie_tk_jax.convert.hosts import CANONICAL, INCOMING, Rule, Rules

Axes = list[tuple[str, ...]]

# How an error calls an axis.
MEANING = {"c": "c_z", "e": "c_z", "m": "c_hidden", "s": "2", "h": "no_heads", "d": "c_hidden"}

# A layer updates the pair it reads.
SAME = {"c": "ce"}


def to_canonical(leaves: Mapping, host: str, layer: str) -> dict[str, dict[str, Any]]:
    """The canonical tree of one layer, from the host's own leaves.

    Args:
      leaves: the layer's parameters, nested as in haiku ({module: {name: array}}) or flat with
        'module/name' or 'module.name'; for cuequivariance and tokamax the keyword arguments.
        Arrays may carry the leading axes of a layer stack. NumPy, JAX or torch.
      host: one of `HOSTS`.
      layer: one of `LAYERS`.

    Returns:
      {group: {name: array}} as `init_triangle_multiplication` and `init_triangle_attention` name
      them; JAX arrays for JAX arrays, NumPy otherwise. `arguments` gives the keywords to call with.

    Raises:
      ValueError, TypeError: a leaf is missing, unknown or does not fit; says which.
    """
    given, wanted = hosts.rules(host, layer), canonical_rules(layer)
    flat = _flat(leaves, hosts.known(host).separator)
    where = f"to_canonical(host={host!r}, layer={layer!r})"
    sizes = _fitted(where, flat, given, hosts.known(host))
    params: dict[str, dict[str, Any]] = {}
    for path, rule in given.items():
        if rule.leaves[0] in flat:
            parts = [flat[leaf] for leaf in rule.leaves]
            merged = _stacked(parts, len(_parse(rule.axes)) - 1) if len(parts) > 1 else parts[0]
            target = wanted[path].axes
            group, name = path.split("/")
            flip = _flips(host, layer, rule)
            params.setdefault(group, {})[name] = _moved(merged, rule.axes, target, sizes, flip)
    return params


def from_canonical(params: Mapping, host: str, layer: str) -> dict[str, Any]:
    """The host's own leaves of one layer, flat, from the canonical tree: undoes `to_canonical`.

    Args:
      params: {group: {name: array}}, leading axes of a layer stack allowed.
      host: one of `HOSTS`.
      layer: one of `LAYERS`.

    Returns:
      {leaf: array} under the host's names: 'module/name' (haiku), 'module.name' (torch), keyword
      arguments (cuequivariance, tokamax).

    Raises:
      ValueError, TypeError: a leaf is missing or does not fit, or the host has no place for it.
    """
    wanted, given = hosts.rules(host, layer), canonical_rules(layer)
    flat = _flat(params, "/")
    where = f"from_canonical(host={host!r}, layer={layer!r})"
    sizes = _fitted(where, flat, given, CANONICAL)
    _representable(where, flat, sizes, wanted, hosts.known(host))
    leaves: dict[str, Any] = {}
    for path, rule in wanted.items():
        if path not in flat:
            continue
        flip = _flips(host, layer, rule)
        array = _moved(flat[path], given[path].axes, rule.axes, sizes, flip)
        if len(rule.leaves) == 1:
            leaves[rule.leaves[0]] = array
        else:
            own = (slice(None),) * (len(_parse(rule.axes)) - 1)
            leaves |= {leaf: array[(..., i, *own)] for i, leaf in enumerate(rule.leaves)}
    return leaves


def canonical_rules(layer: str) -> Rules:
    """The canonical tree's own rules for the layer."""
    return hosts.rules("canonical", layer)


def flatten(tree: Mapping, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{path: value} of a nested mapping."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        here = (*path, str(key))
        flat |= flatten(value, here) if isinstance(value, Mapping) else {here: value}
    return flat


def own_leaf(name: str, separator: str) -> str:
    """A leaf's name with the host's own separator, whichever a file or a nesting put there."""
    return re.sub(r"[/.]+", separator, name).removeprefix(separator)


def _flat(leaves: Mapping, separator: str) -> dict[str, Any]:
    if not isinstance(leaves, Mapping):
        raise TypeError(f"leaves must be a dict of arrays; got {type(leaves).__name__}.")
    flat = flatten(leaves)
    return {own_leaf("/".join(path), separator): as_array(leaf) for path, leaf in flat.items()}


def as_array(leaf: Any) -> Any:
    """A torch tensor as NumPy, its bits unchanged; anything else as it is."""
    if not hasattr(leaf, "detach"):
        return leaf
    tensor = leaf.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy itself has none, so torch refuses
        torch = importlib.import_module("torch")
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def misfit(leaves: Any, given: Rules, host: hosts.Host) -> str | None:
    """What is missing from the names `leaves`, or has no place among them; None if they fit."""
    known = {leaf for rule in given.values() for leaf in rule.leaves}
    needed = {
        leaf
        for path, rule in given.items()
        for leaf in rule.leaves
        if not (host.optional and _is_bias(path))
    }
    if missing := sorted(needed - set(leaves)):
        return f"{', '.join(missing)} missing"
    if unknown := sorted(set(leaves) - known):
        return f"{', '.join(unknown)} unknown"
    return None


def _is_bias(path: str) -> bool:
    """Whether a canonical leaf is the bias of a linear layer, which may be absent."""
    return path.endswith("/bias") and not path.startswith("norm")


def _flips(host: str, layer: str, rule: Rule) -> bool:
    return layer == INCOMING and hosts.known(host).incoming_swapped and "s" in rule.axes


def _fitted(where: str, flat: dict[str, Any], given: Rules, host: hosts.Host) -> dict[str, int]:
    """The sizes of all axes; the error where a leaf is missing, unknown, or fits no sizes."""
    if problem := misfit(flat, given, host):
        names = ", ".join(leaf for rule in given.values() for leaf in rule.leaves)
        raise ValueError(f"{where}: {problem}; the leaves must be {names}.")
    sizes, origins = {"s": 2}, {"s": "two operands"}
    stack = None
    for rule in given.values():
        axes = _parse(rule.axes)[len(rule.leaves) - 1 :]
        for leaf in rule.leaves:
            if leaf not in flat:
                continue
            shape = _shape(where, leaf, flat[leaf])
            lead = shape[: max(0, len(shape) - len(axes))]
            stack = lead if stack is None else stack
            problem = _bound(shape[len(lead) :], axes, leaf, sizes, origins)
            if lead != stack or problem:
                pattern = ", ".join("*".join(MEANING[axis] for axis in group) for group in axes)
                problem = problem or f"the first leaf has the stack axes {stack}"
                raise ValueError(
                    f"{where}: {leaf} has shape {shape}; it must be [*stack, {pattern}], but "
                    f"{problem}. Check that these are the leaves of this host and layer."
                )
        _same_dtype(where, [leaf for leaf in rule.leaves if leaf in flat], flat)
    _square(where, sizes, host)
    return sizes


def _shape(where: str, leaf: str, array: Any) -> tuple[int, ...]:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{where}: {leaf} must be an array; got {type(array).__name__}.")
    return tuple(array.shape)


def _bound(
    shape: tuple[int, ...], axes: Axes, leaf: str, sizes: dict[str, int], origins: dict[str, str]
) -> str | None:
    """Binds the axes of one leaf, without stack axes; returns what disagrees, or None."""
    if len(shape) < len(axes):
        return f"it has {len(shape)} axes"
    for size, group in zip(shape, axes, strict=True):
        unbound = [axis for axis in group if axis not in sizes]
        known = math.prod(sizes[axis] for axis in group if axis in sizes)
        if len(unbound) == 1 and known and size % known == 0:
            for axis in SAME.get(unbound[0], unbound[0]):
                sizes[axis], origins[axis] = size // known, leaf
        elif unbound or known != size:
            held = [f"{MEANING[axis]} = {sizes[axis]} ({origins[axis]})" for axis in group]
            return f"{size} does not go with {', '.join(held)}" if not unbound else f"{size} is odd"
    return None


def _same_dtype(where: str, leaves: list[str], flat: dict[str, Any]) -> None:
    """Two leaves that become one must share a dtype: a cast would not be undone bit for bit."""
    dtypes = [flat[leaf].dtype for leaf in leaves]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"{where}: {leaves[1]} has dtype {dtypes[1]}; it must be {dtypes[0]}, as "
            f"{leaves[0]}, because the two become one array. Cast one of them."
        )


def _square(where: str, sizes: dict[str, int], host: hosts.Host) -> None:
    if host.square and sizes.get("m", sizes["c"]) != sizes["c"]:
        raise ValueError(
            f"{where}: c_hidden is {sizes['m']}; this host needs c_hidden = c_z = {sizes['c']}. "
            "Convert to a host whose c_hidden is free, such as openfold."
        )


def _representable(
    where: str, flat: dict[str, Any], sizes: dict[str, int], wanted: Rules, host: hosts.Host
) -> None:
    """The error where the host has no place for a canonical leaf, or needs one that is absent."""
    _square(where, sizes, host)
    for path, array in flat.items():
        if path not in wanted:
            raise ValueError(
                f"{where}: {path} of shape {tuple(array.shape)} must be absent, for the host has "
                "no such bias. Leave it out if it is zero, or choose another host."
            )
    for path, rule in wanted.items():
        if path not in flat and not host.optional:
            raise ValueError(
                f"{where}: {path} is absent; the host needs {', '.join(rule.leaves)}. Add a bias "
                "of zeros, which changes nothing, or choose a host without biases."
            )


def _parse(axes: str) -> Axes:
    return [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w+", axes)]


def _stacked(parts: list[Any], own: int) -> Any:
    module = jnp if any(isinstance(part, jax.Array) for part in parts) else np
    return module.stack(parts, axis=-1 - own)


def _moved(array: Any, source: str, target: str, sizes: dict[str, int], flip: bool) -> Any:
    """The array with its trailing axes in the order and grouping of `target`; s flipped or not."""
    merged, groups = _parse(source), _parse(target)
    lead = tuple(array.shape[: len(array.shape) - len(merged)])
    names = [axis for group in merged for axis in group]
    order = [axis for group in groups for axis in group]
    array = array.reshape(*lead, *(sizes[axis] for axis in names))
    moved = (len(lead) + names.index(axis) for axis in order)
    array = array.transpose(*range(len(lead)), *moved)
    if flip:
        behind = (slice(None),) * (len(order) - 1 - order.index("s"))
        array = array[(..., slice(None, None, -1), *behind)]
    return array.reshape(*lead, *(math.prod(sizes[axis] for axis in group) for group in groups))
