"""Names that ColabDesign 1.1.1 takes from JAX and that JAX has dropped since.

import old_jax_names

old_jax_names.provide()  # before colabdesign is imported
"""

import functools
import sys
import types

import jax
import jax.numpy as jnp


def provide() -> None:
    """Puts the names back that are missing; none that is there changes what it does."""
    for name in ("tree_map", "tree_flatten", "tree_unflatten"):
        if not hasattr(jax, name):
            setattr(jax, name, getattr(jax.tree_util, name))
    if not hasattr(jax, "util"):
        jax.util = sys.modules["jax.util"] = types.ModuleType("jax.util")
        jax.util.wraps = lambda wrapped, docstr=None: functools.wraps(wrapped)
    jnp.clip = _with_old_limits(jnp.clip)


def _with_old_limits(clip):
    """`jnp.clip` that knows its limits by their old names as well."""

    @functools.wraps(clip)
    def call(x, /, min=None, max=None, *, a_min=None, a_max=None):
        return clip(x, a_min if min is None else min, a_max if max is None else max)

    return call
