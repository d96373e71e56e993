"""The swap in AlphaFold 2's own code: layers, blocks and trunks, forward and gradient.

Every leaf of every parameter tree is random: as the host initialises them the updates of its
triangle layers are zero, and any swap would pass.
"""

import contextlib
from functools import partial

import haiku_hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance, pair
from haiku_hosts import KEY, LAYERS, N, covered, filled

hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")
haiku_hosts.stand_in_for_colabfold_kernels()
modules = pytest.importorskip("alphafold.model.modules", reason="AlphaFold 2 is not installed")

from alphafold.model import config as host_config  # noqa: E402
from alphafold.model import modules_multimer, utils  # noqa: E402

import genie_tk_jax.haiku  # noqa: E402

both = partial(haiku_hosts.both, modules)


def settings(name="model_1_ptm", fused=True, **changes):
    """The host's own configuration, small, exact and without zeroed output projections."""
    config = host_config.model_config(name).model
    trunk, shared = config.embeddings_and_evoformer, config.global_config
    shared.zero_init, shared.bfloat16, shared.deterministic = False, False, True
    shared.update(changes)
    trunk.evoformer_num_block, trunk.extra_msa_stack_num_block = 2, 1
    for direction in ("outgoing", "incoming"):
        trunk.evoformer[f"triangle_multiplication_{direction}"].fuse_projection_weights = fused
    return trunk, shared


def layer(name, trunk, shared, context=contextlib.nullcontext, **how):
    kind = "TriangleMultiplication" if "multiplication" in name else "TriangleAttention"

    def call(z, valid):
        # Looked up when it is called, so that a swap is seen.
        with context():
            return getattr(modules, kind)(trunk.evoformer[name], shared, name=name)(z, valid, **how)

    return hk.transform(call)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_parameters_are_the_hosts(name, fused, zero_init):
    """Same scopes, names, shapes, dtypes, and from the same key the same initial values."""
    trunk, shared = settings(fused=fused, zero_init=zero_init)
    z, valid = pair(1, N, 128), covered(N)
    ours, theirs = both(lambda: layer(name, trunk, shared).init(KEY, z, valid))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs):
        scope, leaf_name = (key.key for key in path)
        np.testing.assert_array_equal(ours[scope][leaf_name], leaf)
        assert ours[scope][leaf_name].dtype == leaf.dtype


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_one_layer(name, fused):
    trunk, shared = settings(fused=fused)
    z, valid = pair(1, N, 128), covered(N)
    params = filled(layer(name, trunk, shared), z, valid)

    def run():
        function = layer(name, trunk, shared)

        def total(params, z):
            out = function.apply(params, KEY, z, valid)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, z)
        return out, gradients

    ours, theirs = both(run)
    assert distance(ours[0], theirs[0]) < 5e-6
    assert distance(ours[1], theirs[1]) < 2e-5


@pytest.mark.parametrize("name", LAYERS)
def test_residual_keyword_of_colabfold(name):
    trunk, shared = settings()
    z, valid, other = pair(1, N, 128), covered(N), pair(7, N, 128)
    params = filled(layer(name, trunk, shared), z, valid)
    for residual in (z, other):
        ours, theirs = both(
            lambda residual=residual: layer(name, trunk, shared, residual=residual).apply(
                params, KEY, z, valid
            )
        )
        assert distance(ours, theirs) < 5e-6


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_no_less_exact_than_the_host(name):
    """Parameters stay float32 in the host's half-precision context, and ours errs no more."""
    trunk, shared = settings()
    z, valid = pair(1, 24, 128, dtype=jnp.bfloat16), covered(24).astype(jnp.bfloat16)

    half = partial(layer, name, trunk, shared, context=utils.half_context)
    params = filled(half(), z, valid)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ours, theirs = both(lambda: jax.jit(half().apply)(params, KEY, z, valid))
    assert ours.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (params, z, valid))
        truth = jax.jit(layer(name, trunk, shared).apply)(wide[0], KEY, *wide[1:])
    assert distance(ours, truth) <= 1.05 * distance(theirs, truth)


def block(is_extra_msa, is_training, shared, trunk):
    name = "extra_msa_stack" if is_extra_msa else "evoformer"

    def call(msa, z, msa_mask, pair_mask):
        iteration = modules.EvoformerIteration(
            trunk.evoformer, shared, is_extra_msa=is_extra_msa, name=name
        )
        activations, masks = {"msa": msa, "pair": z}, {"msa": msa_mask, "pair": pair_mask}
        return iteration(activations, masks, is_training=is_training)

    return hk.transform(call)


@pytest.mark.parametrize("is_extra_msa", [False, True], ids=["main", "extra"])
@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "dropout"])
def test_evoformer_iteration(is_extra_msa, is_training):
    """With dropout too: it lives in the host's wrapper, so its random stream does not change."""
    trunk, shared = settings(deterministic=False)
    rng = np.random.default_rng(0)
    msa = jnp.asarray(rng.normal(size=(4, N, 64 if is_extra_msa else 256)), jnp.float32)
    arguments = (msa, pair(1, N, 128), jnp.ones(msa.shape[:2]), covered(N))
    params = filled(block(is_extra_msa, is_training, shared, trunk), *arguments)

    def run():
        function = block(is_extra_msa, is_training, shared, trunk)

        def total(z):
            out = function.apply(params, KEY, msa, z, *arguments[2:])
            return sum(jnp.sum(jnp.sin(x)) for x in out.values()), out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arguments[1])
        return out, gradient

    ours, theirs = both(run)
    assert distance(ours[0], theirs[0]) < 1e-5
    assert distance(ours[1], theirs[1]) < 1e-4


def monomer_features(rng, s=4, e=3, t=2):
    """What EmbeddingsAndEvoformer of a monomer model with templates reads."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    integers = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    valid = jnp.ones(N).at[-2:].set(0)
    return {
        "aatype": integers(20, N),
        "residue_index": jnp.arange(N),
        "target_feat": normal(N, 22),
        "msa_feat": normal(s, N, 49),
        "seq_mask": valid,
        "msa_mask": jnp.ones((s, N)) * valid,
        "extra_msa": integers(23, e, N),
        "extra_has_deletion": normal(e, N),
        "extra_deletion_value": normal(e, N),
        "extra_msa_mask": jnp.ones((e, N)) * valid,
        "prev_pos": normal(N, 37, 3),
        "prev_msa_first_row": normal(N, 256),
        "prev_pair": normal(N, N, 128),
        "template_aatype": integers(20, t, N),
        "template_mask": jnp.ones(t),
        "template_all_atom_positions": 10 * normal(t, N, 37, 3),
        "template_all_atom_masks": jnp.ones((t, N, 37)) * valid[:, None],
        "template_pseudo_beta": 10 * normal(t, N, 3),
        "template_pseudo_beta_mask": jnp.ones((t, N)) * valid,
    }


def multimer_features(rng, s=8, t=2):
    """What EmbeddingsAndEvoformer of a multimer model with templates reads."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    integers = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    chain = jnp.asarray([1] * 5 + [2] * (N - 5))
    return {
        "aatype": integers(20, N),
        "residue_index": jnp.arange(N),
        "asym_id": chain,
        "entity_id": chain,
        "sym_id": jnp.ones(N, jnp.int32),
        "seq_mask": jnp.ones(N),
        "msa": integers(20, s, N),
        "msa_mask": jnp.ones((s, N)),
        "deletion_matrix": normal(s, N),
        "prev_pos": normal(N, 37, 3),
        "prev_msa_first_row": normal(N, 256),
        "prev_pair": normal(N, N, 128),
        "template_aatype": integers(20, t, N),
        "template_all_atom_positions": 10 * normal(t, N, 37, 3),
        "template_all_atom_mask": jnp.ones((t, N, 37)),
    }


def compare_trunks(function, batch):
    """Where pairs are valid: under the padding a row without keys is zero here, a mean there."""
    params = filled(function(), batch)
    valid = batch["seq_mask"]
    pairs = (valid[:, None] * valid)[..., None]

    def run():
        transformed = function()

        def total(prev_pair):
            out = transformed.apply(params, KEY, {**batch, "prev_pair": prev_pair})
            z = out["pair"] * pairs
            return jnp.sum(jnp.sin(z)), (z, out["msa"] * valid[:, None])

        step = jax.jit(jax.value_and_grad(total, has_aux=True))
        (_, out), gradient = step(batch["prev_pair"])
        return out, gradient

    ours, theirs = both(run)
    assert np.linalg.norm(theirs[1]) > 0
    assert distance(ours[0], theirs[0]) < 1e-4
    assert distance(ours[1], theirs[1]) < 1e-3


@pytest.mark.slow
def test_monomer_trunk_with_templates():
    trunk, shared = settings()
    batch = monomer_features(np.random.default_rng(0))
    compare_trunks(
        lambda: hk.transform(
            lambda batch: modules.EmbeddingsAndEvoformer(trunk, shared)(batch, is_training=False)
        ),
        batch,
    )


@pytest.mark.slow
def test_multimer_trunk_with_templates():
    trunk, shared = settings("model_1_multimer_v3")
    trunk.num_msa = trunk.num_extra_msa = 4
    trunk.template.enabled = True
    batch = multimer_features(np.random.default_rng(0))

    def call(batch):
        module = modules_multimer.EmbeddingsAndEvoformer(trunk, shared)
        return module(batch, is_training=False)

    compare_trunks(lambda: hk.transform(call), batch)


def test_swap_and_unswap():
    before = modules.TriangleAttention
    genie_tk_jax.haiku.swap(modules)
    genie_tk_jax.haiku.swap(modules, implementation="xla")
    assert modules.TriangleAttention.replaces is before
    assert modules.TriangleAttention.implementation == "xla"
    genie_tk_jax.haiku.unswap(modules)
    assert modules.TriangleAttention is before
    genie_tk_jax.haiku.unswap(modules)
    assert modules.TriangleAttention is before


def test_an_unknown_host_is_refused():
    with pytest.raises(ValueError, match="AlphaFold 3.*numpy.*none of these"):
        genie_tk_jax.haiku.swap(np)
    with pytest.raises(ValueError, match="implementation must be one of"):
        genie_tk_jax.haiku.swap(modules, implementation="triton")
