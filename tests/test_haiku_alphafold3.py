"""The drop-ins for AlphaFold 3 against its layers written down in NumPy: it is on no registry."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance, mask, pair

hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

import host_layers  # noqa: E402

import genie_tk_jax.haiku  # noqa: E402

N, C = 7, 32
KEY = jax.random.key(0)


class Host:
    """A modules object with the names and constructors of AlphaFold 3's, and nothing in them."""

    class PairFormerIteration:
        pass

    class TriangleMultiplication:
        class Config:
            equation = "kjc,kic->ijc"

    class GridSelfAttention:
        class Config:
            num_head = 4


def modules():
    """A fresh one, as a swap changes it."""
    names = ("PairFormerIteration", "TriangleMultiplication", "GridSelfAttention")
    return types.SimpleNamespace(**{name: getattr(Host, name) for name in names})


def built(kind, host):
    """The layer of `kind` as AlphaFold 3's blocks build it, and its parameters' scope."""
    shared = types.SimpleNamespace(final_init="linear")
    if kind in ("outgoing", "incoming"):
        equation = {"outgoing": "ikc,jkc->ijc", "incoming": "kjc,kic->ijc"}[kind]
        config = types.SimpleNamespace(equation=equation)
        scope = f"triangle_multiplication_{kind}"
        return lambda: host.TriangleMultiplication(config, shared, name=scope), scope
    scope = {"starting": "pair_attention1", "ending": "pair_attention2"}[kind]
    config, transpose = types.SimpleNamespace(num_head=4), kind == "ending"
    return lambda: host.GridSelfAttention(config, shared, transpose=transpose, name=scope), scope


@pytest.mark.parametrize("kind", host_layers.KINDS)
def test_layer(kind):
    host = modules()
    genie_tk_jax.haiku.swap(host)
    make, scope = built(kind, host)
    function = hk.transform(lambda z, valid: make()(z, valid))
    z, valid = pair(1, N, C), jnp.asarray(mask(2, N) | np.eye(N, dtype=bool), jnp.float32)
    params = function.init(KEY, z, valid)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), params)
    assert {name.split("/")[0] for name in params} == {scope}
    leaves = {
        f"{module.removeprefix(scope + '/')}/{name}": np.asarray(leaf, np.float64)
        for module, members in params.items()
        for name, leaf in members.items()
    }
    expected = host_layers.layer("alphafold3", kind, np.asarray(z), np.asarray(valid), leaves)
    assert distance(function.apply(params, None, z, valid), expected) < 2e-6


def test_swap_keeps_the_hosts_config():
    host = modules()
    with genie_tk_jax.haiku.swapped(host):
        assert host.TriangleMultiplication.Config is Host.TriangleMultiplication.Config
        assert host.GridSelfAttention.Config.num_head == 4
        assert host.TriangleMultiplication is not Host.TriangleMultiplication
    assert host.TriangleMultiplication is Host.TriangleMultiplication


def test_parameters_start_as_the_hosts():
    """In the activations' dtype, norms in float32, gates at a half, no biases."""
    host = modules()
    genie_tk_jax.haiku.swap(host)
    z, valid = pair(1, N, C, dtype=jnp.bfloat16), jnp.ones((N, N))
    for kind in host_layers.KINDS:
        make, scope = built(kind, host)
        params = hk.transform(lambda z, valid, make=make: make()(z, valid)).init(KEY, z, valid)
        for module, members in params.items():
            norm = module.endswith("norm") or module.endswith("norm_input")
            wanted = {"scale", "offset"} if norm else {"weights"}
            assert set(members) == wanted
            dtypes = {leaf.dtype for leaf in members.values()}
            assert dtypes == {jnp.dtype("float32" if norm else "bfloat16")}
        if kind in host_layers.ATTENTION:
            assert not np.any(params[f"{scope}/gating_query"]["weights"])
