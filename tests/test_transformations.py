"""The staged path under vmap, grad, remat, scan and export: the values of the plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import LAYER_IDS, LAYERS, core, distance, mask, pair, params

import genie_tk_jax

N, C = 6, 8
layers = pytest.mark.parametrize("op, how", LAYERS, ids=LAYER_IDS)
# Mapping is the stages' business, and these three run all stages there are.
some_layers = pytest.mark.parametrize(
    "op, how", LAYERS[1:3] + LAYERS[4:], ids=LAYER_IDS[1:3] + LAYER_IDS[4:]
)


def calls(op, how):
    """The layer as a function of (z, mask, params): staged, and the reference."""
    layer = getattr(genie_tk_jax, op)

    def make(implementation):
        def call(z, valid, weights):
            return layer(z, valid, weights, **how, residual=True, implementation=implementation)

        return call

    return make(None), make("xla")


def inputs(op, *stacked):
    """z, mask, params; those whose position is in `stacked` lead with an axis of 3."""
    made = []
    for seed in range(3):
        made.append((pair(seed, N, C), jnp.asarray(mask(9 + seed, N)), params(op, seed, C)))
    return tuple(
        jax.tree.map(lambda *x: jnp.stack(x), *options) if position in stacked else options[0]
        for position, options in enumerate(zip(*made, strict=True))
    )


def axes(*stacked):
    return tuple(0 if position in stacked else None for position in range(3))


def gradient(f):
    """(out, (dz, dparams)) of a layer, so that one compilation serves both."""

    def total(z, valid, weights):
        out = f(z, valid, weights)
        return jnp.sum(jnp.sin(out)), out

    def call(*arguments):
        (_, out), gradients = jax.value_and_grad(total, (0, 2), has_aux=True)(*arguments)
        return out, gradients

    return call


@some_layers
@pytest.mark.parametrize("stacked", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)])
def test_vmap_over_each_argument(op, how, stacked):
    staged, plain = calls(op, how)
    arguments = inputs(op, *stacked)
    ours, theirs = (
        jax.jit(jax.vmap(gradient(f), axes(*stacked)))(*arguments) for f in (staged, plain)
    )
    assert distance(ours, theirs) < 1e-5


@some_layers
def test_gradient_of_vmap_sums_what_is_shared(op, how):
    staged, plain = calls(op, how)
    arguments = inputs(op, 0)
    ours, theirs = (jax.jit(gradient(jax.vmap(f, axes(0))))(*arguments) for f in (staged, plain))
    assert distance(ours, theirs) < 1e-5


@some_layers
def test_nested_vmap(op, how):
    """The outer axis maps parameters, the inner one z: each takes its own way."""
    staged, plain = calls(op, how)
    arguments = inputs(op, 0, 2)

    def nested(f):
        return jax.vmap(jax.vmap(f, (0, None, None)), (None, None, 0))

    ours, theirs = (jax.jit(nested(gradient(f)))(*arguments) for f in (staged, plain))
    assert jax.tree.leaves(ours)[0].shape[:2] == (3, 3)
    assert distance(ours, theirs) < 1e-5


@layers
def test_remat_in_scan(op, how):
    """A layer stack as hosts build it: stacked parameters, rematerialised blocks."""
    staged, plain = calls(op, how)
    z, valid, weights = inputs(op, 2)

    def stack(f):
        def total(z, weights):
            def block(z, w):
                return f(z, valid, w), None

            return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(block), z, weights)[0]))

        return jax.jit(jax.value_and_grad(total, (0, 1)))

    assert distance(stack(staged)(z, weights), stack(plain)(z, weights)) < 1e-4


@layers
def test_vmap_of_size_one_in_scan(op, how):
    """AlphaFold 2 maps its template stack over a single template, inside a layer stack."""
    staged, plain = calls(op, how)
    z, valid, weights = inputs(op, 2)

    def stack(f):
        def total(z, weights):
            def block(z, w):
                return jax.vmap(f, (0, 0, None))(z, valid[None], w), None

            return jnp.sum(jnp.sin(jax.lax.scan(block, z[None], weights)[0]))

        return jax.jit(jax.value_and_grad(total, (0, 1)))

    assert distance(stack(staged)(z, weights), stack(plain)(z, weights)) < 1e-4


@layers
def test_cond_and_eager(op, how):
    staged, plain = calls(op, how)
    arguments = inputs(op)
    expected = plain(*arguments)
    assert distance(staged(*arguments), expected) < 1e-6
    chosen = jax.lax.cond(jnp.array(True), staged, lambda z, valid, w: z, *arguments)
    assert distance(chosen, expected) < 1e-6


@layers
def test_one_program_for_cpu_and_gpu(op, how):
    """Platforms are told apart when a program is lowered, so a CPU machine can export for both."""
    staged, plain = calls(op, how)
    arguments = inputs(op)
    exported = jax.export.export(jax.jit(gradient(staged)), platforms=("cpu", "cuda"))(*arguments)
    assert distance(exported.call(*arguments), gradient(plain)(*arguments)) < 1e-5


@pytest.mark.parametrize("stacked", [(0, 1, 2, 4), (3,), (0, 3), (4,), (0, 1, 2, 3, 4)])
def test_vmap_of_the_core(stacked):
    """An unmapped bias stays shared: the mapped axis goes to the rows."""
    drawn = [core(seed, 3, 4, 5, batch=(2,)) for seed in range(3)]
    arguments = [
        jnp.stack(options) if position in stacked else options[0]
        for position, options in enumerate(zip(*drawn, strict=True))
    ]
    in_axes = tuple(0 if position in stacked else None for position in range(5))

    def call(implementation, gradients):
        def scalar(*operands):
            out = genie_tk_jax.pair_attention(*operands, implementation=implementation)
            return jnp.sum(jnp.sin(out)) if gradients else out

        function = jax.grad(scalar, (0, 1, 2, 3)) if gradients else scalar
        return jax.jit(jax.vmap(function, in_axes))(*arguments)

    for gradients in (False, True):
        assert distance(call(None, gradients), call("xla", gradients)) < 1e-5


def test_unmapped_bias_is_not_copied():
    """Its rows join the rows of one call: nothing of the size of three biases is made."""
    q, k, v, bias, valid = core(1, 2, 64, 64, heads=4, width=2)
    stacked = [jnp.stack([x] * 3) for x in (q, k, v)]
    mapped = jax.vmap(genie_tk_jax.pair_attention, (0, 0, 0, None, None))
    text = str(jax.make_jaxpr(mapped)(*stacked, bias, valid))
    assert "f32[3,4,64,64]" not in text and "f32[3,1,4,64,64]" not in text
    np.testing.assert_allclose(
        mapped(*stacked, bias, valid)[1],
        genie_tk_jax.pair_attention(q, k, v, bias, valid),
        rtol=1e-5,
        atol=1e-6,
    )
