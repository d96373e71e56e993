"""The staged path on eight devices: right values, results sharded like z, no gather of z."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import LAYER_IDS, LAYERS, distance, mask, pair, params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import genie_tk_jax
from genie_tk_jax import _dispatch
from genie_tk_jax._stage import stage

N, C = 16, 8
PADDED_N = 64  # with kernels, a device's part of a padded axis must be a multiple of 8
SPECS = {
    "rows": P("x", None, None),
    "columns": P(None, "x", None),
    "mesh": P("x", "y", None),
    "batch": P("x", None, None, None),
}
layers = pytest.mark.parametrize("op, how", LAYERS, ids=LAYER_IDS)
ways = pytest.mark.parametrize("way", SPECS)


def placed(way, z, valid):
    devices = np.array(jax.devices()[:8])
    spec = SPECS[way]
    mesh = Mesh(devices.reshape(4, 2), ("x", "y")) if way == "mesh" else Mesh(devices, ("x",))
    sharding = NamedSharding(mesh, spec)
    mask_sharding = NamedSharding(mesh, P(*spec[:-1]))
    return jax.device_put(z, sharding), jax.device_put(valid, mask_sharding), sharding


def gathered(text, numbers):
    """The all-gathers of compiled HLO whose results hold at least this many numbers."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return [s for s in shapes if np.prod([int(d) for d in s.split(",") if d]) >= numbers]


def drawn(way, n=N):
    batch = (8,) if way == "batch" else ()
    return pair(1, n, C, batch), mask(2, n, batch)


@layers
@ways
def test_layers_and_gradients(op, how, way):
    z, valid = drawn(way)
    weights = params(op, 3, C)
    layer = getattr(genie_tk_jax, op)

    def scalar(implementation):
        def total(z, weights, valid):
            out = layer(z, valid, weights, **how, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    z_sharded, valid_sharded, sharding = placed(way, z, valid)
    (_, out), (dz, d_weights) = jax.jit(scalar(None))(z_sharded, weights, valid_sharded)
    (_, expected), gradients = jax.jit(scalar("xla"))(z, weights, valid)
    assert distance(out, expected) < 1e-5
    assert distance((dz, d_weights), gradients) < 1e-5
    assert out.sharding.is_equivalent_to(sharding, z.ndim)
    assert dz.sharding.is_equivalent_to(sharding, z.ndim)


@ways
@pytest.mark.parametrize("n", [N, PADDED_N])
def test_pointwise_stages_gather_nothing(way, n, monkeypatch):
    if n == PADDED_N:
        monkeypatch.setattr(_dispatch, "kernels_absent", lambda: None)
    z, valid = drawn(way, n)
    weights = params("triangle_multiplication", 3, C)
    z, valid, sharding = placed(way, z, valid)

    def project(z, weights):
        a, b = genie_tk_jax.gated_projection(z, valid, weights)
        return jnp.sum(jnp.sin(a) * jnp.cos(b)), a

    def output(z, weights):
        t = jnp.moveaxis(z, -1, -3)
        t = jnp.concatenate([t, t], axis=-3)[..., : C // 2 + 4, :, :]
        out = genie_tk_jax.gated_output(t, z, weights, mask=valid)
        return jnp.sum(jnp.sin(out)), out

    for function in (project, output):
        compiled = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True)).lower(z, weights)
        compiled = compiled.compile()
        assert not gathered(compiled.as_text(), z.size // 2)
        _, (dz, _) = compiled(z, weights)
        assert dz.sharding.is_equivalent_to(sharding, z.ndim)


@ways
@pytest.mark.parametrize("node", ["starting", "ending"])
def test_attention_gathers_no_z_that_its_rows_do_not_need(node, way):
    """With whole rows of attention on every device only the bias, H / C of z, goes round."""
    whole_rows = {"starting": ("rows", "batch"), "ending": ("columns", "batch")}[node]
    if way not in whole_rows:
        pytest.skip("keys of a row lie on several devices: they have to travel")
    z, valid = drawn(way)
    weights = params("triangle_attention", 3, C)
    z, valid, _ = placed(way, z, valid)

    def total(z, weights):
        return jnp.sum(jnp.sin(genie_tk_jax.triangle_attention(z, valid, weights, node=node)))

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(z, weights).compile()
    assert not gathered(compiled.as_text(), z.size // 2)


def test_a_stage_runs_on_shards():
    """The reference of a stage sees one device's part; an axis it needs whole is whole."""
    seen = []

    def reference(arrays, weights):
        (x,) = arrays
        seen.append(x.shape)
        return x * weights

    double = stage("double", reference, "b i k -> b i k", whole="k")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    x = jax.device_put(jnp.arange(96.0).reshape(2, 8, 6), NamedSharding(mesh, P("y", "x", None)))
    out = jax.jit(lambda x: double((x,), jnp.float32(2)))(x)
    np.testing.assert_array_equal(out, 2 * np.arange(96.0).reshape(2, 8, 6))
    assert (1, 2, 6) in seen
    assert out.sharding.is_equivalent_to(x.sharding, 3)


@pytest.mark.parametrize("n", [6, 10])
def test_an_axis_that_does_not_divide_stays_whole(n, monkeypatch):
    if n == 10:
        monkeypatch.setattr(_dispatch, "kernels_absent", lambda: None)
    z, valid = pair(1, n, C), mask(2, n)
    weights = params("triangle_multiplication", 3, C)
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))

    @jax.jit
    def call(z):
        z = jax.lax.with_sharding_constraint(z, NamedSharding(mesh, P()))
        return genie_tk_jax.triangle_multiplication(z, valid, weights, direction="outgoing")

    expected = genie_tk_jax.triangle_multiplication(
        z, valid, weights, direction="outgoing", implementation="xla"
    )
    assert distance(call(z), expected) < 1e-6


def test_inside_shard_map():
    """Where the caller has split the batch by hand, each device runs the layer on its part."""
    z, valid = pair(1, 5, C, (8,)), jnp.asarray(mask(2, 5, (8,)))
    weights = params("triangle_attention", 3, C)
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))

    def call(z, valid):
        return genie_tk_jax.triangle_attention(z, valid, weights, node="ending")

    split = jax.shard_map(call, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"))
    assert distance(jax.jit(split)(z, valid), call(z, valid)) < 1e-6
