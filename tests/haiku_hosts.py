"""What the tests of all hosts written in haiku share: parameters, masks, both sides of a swap."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from draw import mask

import genie_tk_jax.haiku

N = 9
KEY = jax.random.PRNGKey(0)
LAYERS = [
    "triangle_multiplication_outgoing",
    "triangle_multiplication_incoming",
    "triangle_attention_starting_node",
    "triangle_attention_ending_node",
]


class NoKernels(types.ModuleType):
    """ColabFold's own kernels, which its AlphaFold imports without asking for: there are none."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def stand_in_for_colabfold_kernels():
    """Lets ColabFold's AlphaFold be imported where its kernels are not installed."""
    if "colabfold_kernels" not in sys.modules and not importlib.util.find_spec("colabfold_kernels"):
        package = types.ModuleType("colabfold_kernels")
        package.fused_ops = NoKernels("colabfold_kernels.fused_ops")
        sys.modules["colabfold_kernels"] = package
        sys.modules["colabfold_kernels.fused_ops"] = package.fused_ops


def filled(function, *arguments):
    """Random parameters for a transformed function: no leaf zero or constant."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        # The widest axis is near the number of inputs, also where a layer stack's axis leads.
        scale = max(leaf.shape, default=1) ** -0.5
        mean = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(function.init, KEY, *arguments))


def both(modules, function):
    """`function()` with the host's layers and with ours: ours, theirs."""
    theirs = function()
    with genie_tk_jax.haiku.swapped(modules):
        ours = function()
    return ours, theirs


def covered(n, seed=2):
    """An asymmetric mask in which every row and every column keeps a valid pair."""
    return jnp.asarray(mask(seed, n) | np.eye(n, dtype=bool), jnp.float32)
