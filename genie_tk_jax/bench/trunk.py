"""Evoformer blocks of ColabFold's AlphaFold, its own code, with and without the swap.

A trunk is what the host makes of its blocks: a scan over stacked parameters with each block under
remat. Parameters are random in every leaf, since the host's own initial values make the updates of
all triangle layers zero.
"""

import contextlib
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ("alphafold-colabfold", "dm-haiku", "colabfold-kernels")
MSA_CHANNELS, PAIR_CHANNELS = 256, 128


class Variant(NamedTuple):
    """How a contestant runs the host's block.

    swap: with our triangle layers, not its own.
    chunked: attention and transitions go a few rows at a time, as the host predicts.
    kernels: with colabfold-kernels, the host's own fused kernels.
    """

    swap: bool = False
    chunked: bool = False
    kernels: bool = False


STOCK, UNCHUNKED, KERNELS, GENIE = "stock", "unchunked", "colabfold-kernels", "genie"
VARIANTS = {
    STOCK: Variant(chunked=True),
    UNCHUNKED: Variant(),
    KERNELS: Variant(kernels=True),
    GENIE: Variant(swap=True),
}


@cache
def _block(name: str, dtype: str) -> Any:
    """haiku's pair of init and apply for one block on msa, z and valid, which are Problem's.

    Raises:
      ImportError: the host or its kernels are not installed.
    """
    hk = importlib.import_module("haiku")
    config, modules, utils, common = (
        importlib.import_module(f"alphafold.model.{module}")
        for module in ("config", "modules", "utils", "common_modules")
    )
    from genie_tk_jax.haiku import swapped

    variant = VARIANTS[name]
    model = config.model_config("model_3_ptm").model
    trunk, shared = model.embeddings_and_evoformer, model.global_config
    shared.update({"zero_init": False, "deterministic": True, "use_pallas": False})
    if variant.kernels:
        shared.update(importlib.import_module("colabfold_kernels").dispatch())

    def call(msa, z, valid):
        common.set_kernel_context(shared)
        masks = {"msa": jnp.ones(msa.shape[:1])[:, None] * valid, "pair": valid[:, None] * valid}
        masks = {name: mask.astype(dtype) for name, mask in masks.items()}
        layers = swapped(modules) if variant.swap else contextlib.nullcontext()
        with utils.half_context(), layers:
            iteration = modules.EvoformerIteration(trunk.evoformer, shared, is_extra_msa=False)
            # Training, which here has no dropout, is what leaves out the chunks.
            out = iteration({"msa": msa, "pair": z}, masks, is_training=not variant.chunked)
        return out["msa"], out["pair"]

    return hk.transform(call)


class Problem(NamedTuple):
    """What a trunk is called on: arrays, or their shapes alone.

    params: of the host, stacked.
    msa, z: [S, N, 256] and [N, N, 128].
    valid: [N], 1 where a residue is there and 0 where it is padding.
    """

    params: Any
    msa: Any
    z: Any
    valid: Any


def depth(problem: Problem) -> int:
    """The number of blocks."""
    return jax.tree.leaves(problem.params)[0].shape[0]


def shapes(blocks: int, n: int, rows: int, dtype: str) -> Problem:
    """The shapes of a problem of n residues and `rows` sequences."""

    def activations(n):
        msa, z = (rows, n, MSA_CHANNELS), (n, n, PAIR_CHANNELS)
        kinds = ((msa, dtype), (z, dtype), ((n,), "float32"))
        return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]

    # Parameters do not depend on the number of residues.
    one = jax.eval_shape(_block(UNCHUNKED, dtype).init, jax.random.key(0), *activations(8))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((blocks, *x.shape), x.dtype), one)
    return Problem(stacked, *activations(n))


def pose(problem: Problem, masked: float) -> Problem:
    """Draws a problem of these shapes, the last residues being padding."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        # The widest axis is near the number of inputs.
        values = max(leaf.shape[1:]) ** -0.5 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

    n = problem.z.shape[0]
    msa, z = (
        jax.random.normal(jax.random.key(seed), leaf.shape).astype(leaf.dtype)
        for seed, leaf in enumerate((problem.msa, problem.z))
    )
    valid = jnp.asarray(np.arange(n) < n - int(masked * n), jnp.float32)
    params = jax.tree_util.tree_map_with_path(draw, problem.params)
    return Problem(params, msa, z, valid)


@cache
def step(name: str, dtype: str, which: str) -> Callable[..., Any]:
    """The call that is timed: outputs of a trunk and, for "fwd+bwd", gradients of msa and z.

    Outputs are zeroed where there is padding, whose rows host and swap fill differently.
    """
    # Its own jit, so that it is traced once for trunks of every depth.
    apply = jax.jit(_block(name, dtype).apply)

    def forward(activations, params, valid):
        def of_block(activations, params):
            return apply(params, jax.random.key(0), *activations, valid), None

        msa, z = jax.lax.scan(jax.checkpoint(of_block), activations, params)[0]
        valid = valid.astype(dtype)
        return msa * valid[:, None], z * (valid[:, None] * valid)[..., None]

    def loss(activations, params, valid):
        out = forward(activations, params, valid)
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out), out

    def run(params, msa, z, valid):
        if which == "fwd":
            return (forward((msa, z), params, valid),)
        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)((msa, z), params, valid)
        return out, gradients

    return run
