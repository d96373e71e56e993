"""The swap in ColabDesign's copy of AlphaFold 2: layers and a block; test_examples.py has a design.

Every leaf of every parameter tree is random: as the host initialises them the updates of its
triangle layers are zero, and any swap would pass.
"""

import contextlib
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

import haiku_hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance, pair
from haiku_hosts import KEY, LAYERS, N, covered, filled

hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")
if importlib.util.find_spec("colabdesign") is None:
    pytest.skip("ColabDesign is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import old_jax_names  # noqa: E402

old_jax_names.provide()
FLAGS = os.environ.get("XLA_FLAGS", "")
import colabdesign  # noqa: E402, F401

os.environ["XLA_FLAGS"] = FLAGS  # which colabdesign has overwritten
from colabdesign.af.alphafold.model import config as host_config  # noqa: E402
from colabdesign.af.alphafold.model import modules, utils  # noqa: E402

both = partial(haiku_hosts.both, modules)


def settings(fused=True):
    """The host's own configuration, as ColabDesign changes it, without zeroed projections."""
    model = host_config.model_config("model_3_ptm").model
    trunk, shared = model.embeddings_and_evoformer, model.global_config
    shared.zero_init, shared.subbatch_size = False, None
    for direction in ("outgoing", "incoming"):
        trunk.evoformer[f"triangle_multiplication_{direction}"].fuse_projection_weights = fused
    return trunk, shared


def layer(name, fused=True, context=contextlib.nullcontext):
    trunk, shared = settings(fused)
    kind = "TriangleMultiplication" if "multiplication" in name else "TriangleAttention"

    def call(z, valid):
        with context():
            return getattr(modules, kind)(trunk.evoformer[name], shared, name=name)(z, valid)

    return hk.transform(call)


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer(name):
    z, valid = pair(1, N, 128), covered(N)
    params = filled(layer(name), z, valid)

    def run():
        function = layer(name)

        def total(params, z):
            out = function.apply(params, KEY, z, valid)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, z)
        return out, gradients

    ours, theirs = both(run)
    assert distance(ours[0], theirs[0]) < 5e-6
    assert distance(ours[1], theirs[1]) < 2e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_the_hosts(name, fused):
    z, valid = pair(1, N, 128), covered(N)
    ours, theirs = both(lambda: jax.eval_shape(layer(name, fused).init, KEY, z, valid))
    assert ours == theirs


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_no_less_exact_than_the_host(name):
    z, valid = pair(1, 24, 128, dtype=jnp.bfloat16), covered(24).astype(jnp.bfloat16)
    half = partial(layer, name, context=utils.bfloat16_context)
    params = filled(half(), z, valid)
    ours, theirs = both(lambda: jax.jit(half().apply)(params, KEY, z, valid))
    assert ours.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (params, z, valid))
        truth = jax.jit(layer(name).apply)(wide[0], KEY, *wide[1:])
    assert distance(ours, truth) <= 1.05 * distance(theirs, truth)


def block(dtype, use_dropout):
    trunk, shared = settings()
    context = utils.bfloat16_context if dtype == jnp.bfloat16 else contextlib.nullcontext

    def call(msa, z, valid):
        masks = {"msa": jnp.ones(msa.shape[:2], dtype), "pair": valid.astype(dtype)}
        with context():
            iteration = modules.EvoformerIteration(trunk.evoformer, shared, is_extra_msa=False)
            activations = {"msa": msa.astype(dtype), "pair": z.astype(dtype)}
            out = iteration(activations, masks, use_dropout=use_dropout)
        return out["msa"], out["pair"]

    return hk.transform(call)


@pytest.mark.slow
def test_evoformer_iteration():
    """With dropout, whose random stream a swap leaves alone; and in bfloat16 against float32."""
    rng = np.random.default_rng(0)
    msa = jnp.asarray(rng.normal(size=(4, N, 256)), jnp.float32)
    arguments = (msa, pair(1, N, 128), covered(N))
    params = filled(block(jnp.float32, True), *arguments)

    def run(dtype):
        function = block(dtype, True)

        def total(z):
            out = function.apply(params, KEY, msa, z, arguments[2])
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out), out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments[1])
        return out, gradient

    ours, theirs = both(lambda: run(jnp.float32))
    assert distance(ours[0], theirs[0]) < 1e-5
    assert distance(ours[1], theirs[1]) < 1e-4
    narrow_ours, narrow_theirs = both(lambda: run(jnp.bfloat16))
    for mine, host, truth in zip(narrow_ours, narrow_theirs, theirs, strict=True):
        assert distance(mine, truth) <= 1.05 * distance(host, truth)
