"""The canonical parameter trees: names, shapes and initialisers, stated once.

A tree is a nested dict. Linear weights are [in, out]; fused projections are the halves a | b, a and
b in the roles of Algorithms 11 and 12 for both directions; head axes are explicit. An absent bias
is an absent leaf, never zeros.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Params = dict[str, dict[str, jax.Array]]


class Leaf(NamedTuple):
    """One parameter: shape, axis names, AlphaFold's initialiser, may it be absent, input axes."""

    shape: tuple[int, ...]
    axes: str
    alphafold: Initializer
    optional: bool = False
    inputs: int = 1


Spec = dict[str, dict[str, Leaf]]

INITIALISATIONS = ("alphafold", "random")

_lecun = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_zeros, _ones = initializers.zeros, initializers.ones


def _haiku_glorot(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """AlphaFold 2's q, k and v: uniform with the fans that haiku takes from [C, H, D]."""
    channels, heads, width = shape
    limit = math.sqrt(3.0 / (channels * (heads + width) / 2))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _norm(channels: int, axis: str) -> dict[str, Leaf]:
    shape = (channels,)
    return {"scale": Leaf(shape, f"[{axis}]", _ones), "bias": Leaf(shape, f"[{axis}]", _zeros)}


def _linear(c_in: int, c_out: int, axes: tuple[str, str], kernel: Initializer, bias: Initializer):
    return {
        "kernel": Leaf((c_in, c_out), f"[{axes[0]}, {axes[1]}]", kernel),
        "bias": Leaf((c_out,), f"[{axes[1]}]", bias, optional=True),
    }


def triangle_multiplication_spec(c_z: int, c_hidden: int) -> Spec:
    """The leaves of one triangle multiplication (Algorithms 11 and 12)."""
    return {
        "norm_in": _norm(c_z, "c_z"),
        "proj_in": _linear(c_z, 2 * c_hidden, ("c_z", "2 c_hidden"), _lecun, _zeros),
        "gate_in": _linear(c_z, 2 * c_hidden, ("c_z", "2 c_hidden"), _zeros, _ones),
        "norm_out": _norm(c_hidden, "c_hidden"),
        "proj_out": _linear(c_hidden, c_z, ("c_hidden", "c_z"), _zeros, _zeros),
        "gate_out": _linear(c_z, c_z, ("c_z", "c_z"), _zeros, _ones),
    }


def triangle_attention_spec(c_in: int, c_hidden: int, no_heads: int) -> Spec:
    """The leaves of one triangle attention (Algorithms 13 and 14); c_hidden is per head."""
    heads = (no_heads, c_hidden)
    kernel_axes = "[c_in, no_heads, c_hidden]"
    qkv = {"kernel": Leaf((c_in, *heads), kernel_axes, _haiku_glorot)}
    return {
        "norm": _norm(c_in, "c_in"),
        "pair_bias": {
            "kernel": Leaf(
                (c_in, no_heads), "[c_in, no_heads]", initializers.normal(1 / math.sqrt(c_in))
            )
        },
        "q": dict(qkv),
        "k": dict(qkv),
        "v": dict(qkv),
        "gate": {
            "kernel": Leaf((c_in, *heads), kernel_axes, _zeros),
            "bias": Leaf(heads, "[no_heads, c_hidden]", _ones, optional=True),
        },
        "out": {
            "kernel": Leaf((*heads, c_in), "[no_heads, c_hidden, c_in]", _zeros, inputs=2),
            "bias": Leaf((c_in,), "[c_in]", _zeros, optional=True),
        },
    }


def _random(name: str, leaf: Leaf) -> Initializer:
    """Draws that leave nothing zero or constant, at scales that keep updates of order one."""
    if name == "scale":
        return lambda key, shape, dtype: 1 + 0.2 * jax.random.normal(key, shape, dtype)
    if name == "bias":
        return initializers.normal(0.2)
    return initializers.normal(1 / math.sqrt(math.prod(leaf.shape[: leaf.inputs])))


def initialiser(name: str, leaf: Leaf, init: str) -> Initializer:
    """The initialiser of a leaf called `name` under the scheme `init`."""
    if init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {INITIALISATIONS}; got {init!r}")
    return leaf.alphafold if init == "alphafold" else _random(name, leaf)


def initialise_group(
    key: jax.Array, leaves: dict[str, Leaf], *, use_bias: bool, init: str, dtype: Any
) -> dict[str, jax.Array]:
    """Draws the leaves of one group; without `use_bias` the optional ones are absent."""
    kept = {name: leaf for name, leaf in leaves.items() if use_bias or not leaf.optional}
    keys = jax.random.split(key, len(kept))
    return {
        name: initialiser(name, leaf, init)(leaf_key, leaf.shape, dtype)
        for (name, leaf), leaf_key in zip(kept.items(), keys, strict=True)
    }


def initialise(
    key: jax.Array, spec: Spec, *, use_bias: bool = True, init: str = "alphafold", dtype=jnp.float32
) -> Params:
    """Draws every leaf of `spec`."""
    keys = jax.random.split(key, len(spec))
    return {
        group: initialise_group(group_key, leaves, use_bias=use_bias, init=init, dtype=dtype)
        for (group, leaves), group_key in zip(spec.items(), keys, strict=True)
    }


def init_triangle_multiplication(
    key: jax.Array,
    c_z: int,
    c_hidden: int,
    *,
    use_bias: bool = True,
    init: str = "alphafold",
    dtype=jnp.float32,
) -> Params:
    """Parameters for `triangle_multiplication`.

    Args:
      key: a JAX PRNG key.
      c_z: channels of the pair representation.
      c_hidden: channels of a, b and the contraction.
      use_bias: False leaves out the biases of the four linear layers (AlphaFold 3, Boltz).
      init: "alphafold", whose zero output projection makes the first update zero, or "random",
        which leaves nothing zero.
      dtype: dtype of every leaf.

    Source: AlphaFold 2's initialisation, Jumper et al. 2021, supplementary section 1.11.4.
    """
    spec = triangle_multiplication_spec(c_z, c_hidden)
    return initialise(key, spec, use_bias=use_bias, init=init, dtype=dtype)


def init_triangle_attention(
    key: jax.Array,
    c_in: int,
    c_hidden: int,
    no_heads: int,
    *,
    use_bias: bool = True,
    init: str = "alphafold",
    dtype=jnp.float32,
) -> Params:
    """Parameters for `triangle_attention`.

    Args:
      key: a JAX PRNG key.
      c_in: channels of the pair representation.
      c_hidden: channels per head.
      no_heads: attention heads.
      use_bias: False leaves out the biases of gate and output (AlphaFold 3, Boltz).
      init: "alphafold", whose zero output projection makes the first update zero, or "random",
        which leaves nothing zero.
      dtype: dtype of every leaf.

    Source: AlphaFold 2's initialisation, Jumper et al. 2021, supplementary section 1.11.4.
    """
    spec = triangle_attention_spec(c_in, c_hidden, no_heads)
    return initialise(key, spec, use_bias=use_bias, init=init, dtype=dtype)


def axis_size(params: Any, group: str, name: str, axis: int) -> int:
    """The size of an axis of a leaf, or 0 where the tree does not have it: `checked` then says."""
    try:
        return params[group][name].shape[axis]
    except (AttributeError, IndexError, KeyError, TypeError):
        return 0


def checked(op: str, params: Any, spec: Spec, groups: tuple[str, ...] | None = None) -> Params:
    """`params` as a plain nested dict, or the error that names the leaf that does not fit.

    Args:
      groups: the groups that a stage reads; others may be there and are left out.
    """
    if not isinstance(params, Mapping):
        raise _misfit(op, f"params is a {type(params).__name__}", f"a dict of {list(spec)}")
    wanted = groups or tuple(spec)
    for group in wanted:
        if group not in params:
            raise _misfit(op, f"params[{group!r}] is missing", f"a dict of {list(spec[group])}")
        if not isinstance(params[group], Mapping):
            got = f"params[{group!r}] is a {type(params[group]).__name__}"
            raise _misfit(op, got, f"a dict of {list(spec[group])}")
    for group in params:
        if group not in spec:
            raise _misfit(op, f"params[{group!r}] is unknown", f"one of {list(spec)}")
    return {group: _checked_group(op, group, params[group], spec[group]) for group in wanted}


def _checked_group(op: str, group: str, given: Mapping, leaves: dict[str, Leaf]):
    for name in given:
        if name not in leaves:
            got = f"params[{group!r}][{name!r}] is unknown"
            raise _misfit(op, got, f"one of {list(leaves)}")
    for name, leaf in leaves.items():
        where = f"params[{group!r}][{name!r}]"
        if name not in given:
            if leaf.optional:
                continue
            raise _misfit(op, f"{where} is missing", f"an array {leaf.axes} = {leaf.shape}")
        value = given[name]
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise _misfit(op, f"{where} is a {type(value).__name__}", f"an array {leaf.axes}")
        if tuple(value.shape) != leaf.shape:
            got = f"{where} has shape {tuple(value.shape)}"
            raise _misfit(op, got, f"{leaf.axes} = {leaf.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise _misfit(op, f"{where} has dtype {value.dtype}", "a floating dtype")
    return {name: jnp.asarray(given[name]) for name in leaves if name in given}


def _misfit(op: str, got: str, must: str) -> ValueError:
    layer = "triangle_attention" if "attention" in op else "triangle_multiplication"
    return ValueError(f"{op}: {got}; it must be {must}. init_{layer} makes a tree that fits.")
