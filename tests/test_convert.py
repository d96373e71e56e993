"""A host's layer and ours on its converted parameters are one function; no bit of them is lost."""

import host_layers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from draw import params
from host_layers import ATTENTION, CASES, LAYERS, C

from genie_tk_jax import convert
from genie_tk_jax.convert.layer import flatten

N = 5
cases = pytest.mark.parametrize("host, kind", CASES, ids=["-".join(case) for case in CASES])
STACKS_AND_DTYPES = [((), np.float32), ((2,), jnp.bfloat16), ((2, 3), np.float16)]


def same_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def assert_same_trees(result, expected):
    result, expected = flatten(result), flatten(expected)
    assert sorted(result) == sorted(expected)
    for path, leaf in result.items():
        assert same_bits(leaf, expected[path]), path


@cases
def test_the_converted_layer_is_the_hosts(host, kind):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(N, N, C))
    # A key in every row and column: hosts and we differ by design where there is none.
    mask = (rng.random((N, N)) < 0.7) | np.eye(N, dtype=bool)
    p = host_layers.leaves(host, kind)
    expected = host_layers.layer(host, kind, z, mask, p)
    # AlphaFold 3 transposes the mask in the starting node, where the paper does not.
    mask = mask.T if (host, kind) == ("alphafold3", "starting") else mask
    tree, how = convert.to_canonical(p, host, LAYERS[kind]), convert.arguments(host, LAYERS[kind])
    op = oracle.triangle_attention if kind in ATTENTION else oracle.triangle_multiplication
    np.testing.assert_allclose(op(z, mask, tree, **how), expected, rtol=1e-9, atol=1e-9)


@cases
def test_round_trip_from_the_host(host, kind):
    for stack, dtype in STACKS_AND_DTYPES:
        p = host_layers.leaves(host, kind, stack=stack, dtype=dtype)
        tree = convert.to_canonical(p, host, LAYERS[kind])
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(tree))
        assert_same_trees(convert.from_canonical(tree, host, LAYERS[kind]), p)


@cases
def test_a_stack_converts_like_its_layers(host, kind):
    stacked = host_layers.leaves(host, kind, stack=(2,))
    whole = convert.to_canonical(stacked, host, LAYERS[kind])
    for i in range(2):
        one = {name: leaf[i] for name, leaf in stacked.items()}
        expected = convert.to_canonical(one, host, LAYERS[kind])
        assert_same_trees(jax.tree.map(lambda x, i=i: x[i], whole), expected)


@cases
def test_traced_leaves_convert_alike(host, kind):
    p = host_layers.leaves(host, kind)
    expected = convert.to_canonical(p, host, LAYERS[kind])
    traced = jax.jit(lambda p: convert.to_canonical(p, host, LAYERS[kind]))(p)
    assert_same_trees(traced, expected)
    back = jax.jit(lambda tree: convert.from_canonical(tree, host, LAYERS[kind]))(traced)
    assert_same_trees(back, p)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_our_own_trees_pass_through_hosts_that_have_room(kind, use_bias):
    op = "triangle_attention" if kind in ATTENTION else "triangle_multiplication"
    tree = params(op, 3, C, use_bias=use_bias)
    hosts = ("alphafold2", "openfold_fused") if use_bias else ("canonical",)
    if not use_bias and kind in ATTENTION:
        hosts += ("alphafold3", "boltz")
    for host in hosts:
        p = convert.from_canonical(tree, host, LAYERS[kind])
        assert_same_trees(convert.to_canonical(p, host, LAYERS[kind]), tree)


def test_nested_and_flat_leaves_are_alike():
    flat = host_layers.leaves("alphafold2", "starting")
    nested = {"feat_2d_weights": flat["feat_2d_weights"], "query_norm": {}, "attention": {}}
    for name in set(flat) - {"feat_2d_weights"}:
        module, leaf = name.split("/")
        nested[module][leaf] = flat[name]
    layer = LAYERS["starting"]
    expected = convert.to_canonical(flat, "alphafold2", layer)
    assert_same_trees(convert.to_canonical(nested, "alphafold2", layer), expected)


def test_fused_and_unfused_alphafold_agree():
    """As AlphaFold's own loader fuses them: left | right, in both directions."""
    for kind in ("outgoing", "incoming"):
        p = host_layers.leaves("alphafold2", kind)
        fused = {
            f"{name}/{leaf}": np.concatenate(
                [p[f"left_{name}/{leaf}"], p[f"right_{name}/{leaf}"]], axis=-1
            )
            for name in ("projection", "gate")
            for leaf in ("weights", "bias")
        }
        for old, new in (
            ("layer_norm_input", "left_norm_input"),
            ("center_layer_norm", "center_norm"),
        ):
            fused |= {f"{new}/{leaf}": p[f"{old}/{leaf}"] for leaf in ("scale", "offset")}
        for name in ("output_projection", "gating_linear"):
            fused |= {f"{name}/{leaf}": p[f"{name}/{leaf}"] for leaf in ("weights", "bias")}
        assert_same_trees(
            convert.to_canonical(fused, "alphafold2_fused", LAYERS[kind]),
            convert.to_canonical(p, "alphafold2", LAYERS[kind]),
        )


def changed(host, kind, **by):
    p = host_layers.leaves(host, kind)
    for name, value in by.items():
        name = name.replace("__", ".")
        p[name] = value
        if value is None:
            del p[name]
    return p


@pytest.mark.parametrize(
    "by, error, words",
    [
        (dict(linear_a_p__weight=None), ValueError, ["linear_a_p.weight missing"]),
        (dict(linear_q__weight=np.ones(3)), ValueError, ["linear_q.weight unknown"]),
        (
            dict(linear_z__weight=np.ones((C, 5))),
            ValueError,
            ["linear_z.weight has shape (8, 5)", "c_z, c_hidden", "c_hidden = 6"],
        ),
        (dict(linear_z__weight=np.ones((7, 6))), ValueError, ["7 does not go with c_z = 8"]),
        (dict(linear_a_p__weight=np.ones(C)), ValueError, ["it has 1 axes"]),
        (dict(linear_g__bias=np.ones((2, C))), ValueError, ["linear_g.bias has shape (2, 8)"]),
        (dict(linear_g__bias=[1.0]), TypeError, ["linear_g.bias must be an array; got list"]),
        (
            dict(linear_b_g__bias=np.ones(6, np.float16)),
            ValueError,
            ["linear_b_g.bias has dtype float16", "float32", "linear_a_g.bias"],
        ),
    ],
)
def test_leaves_that_do_not_fit(by, error, words):
    p = changed("openfold", "outgoing", **by)
    with pytest.raises(error) as refusal:
        convert.to_canonical(p, "openfold", LAYERS["outgoing"])
    for word in words:
        assert word in str(refusal.value)


def test_what_a_host_has_no_place_for():
    tree = params("triangle_multiplication", 0, C)
    with pytest.raises(ValueError, match="proj_in/bias .* must be absent"):
        convert.from_canonical(tree, "tokamax", LAYERS["outgoing"])
    with pytest.raises(ValueError, match="c_hidden is 8; this host needs c_hidden = c_z = 16"):
        tree = params("triangle_multiplication", 0, 16, use_bias=False)
        tree = {**tree, "norm_out": {"scale": np.ones(8), "bias": np.ones(8)}}
        tree["proj_in"] = tree["gate_in"] = {"kernel": np.ones((16, 16))}
        tree["proj_out"] = {"kernel": np.ones((8, 16))}
        convert.from_canonical(tree, "boltz", LAYERS["outgoing"])
    tree = params("triangle_attention", 0, C, use_bias=False)
    with pytest.raises(ValueError, match="gate/bias is absent; the host needs attention/gating_b"):
        convert.from_canonical(tree, "alphafold2", LAYERS["starting"])
    with pytest.raises(ValueError, match="tokamax has no parameters for triangle_attention"):
        convert.from_canonical(tree, "tokamax", LAYERS["starting"])


def test_unknown_names():
    with pytest.raises(ValueError, match="host must be one of canonical, alphafold2, .*'af2'"):
        convert.to_canonical({}, "af2", LAYERS["outgoing"])
    with pytest.raises(ValueError, match="layer must be one of .*'outgoing'"):
        convert.to_canonical({}, "openfold", "outgoing")


def test_alphafold3_alone_has_the_unswapped_ending_node():
    unswapped = {
        host
        for host in convert.HOSTS
        if convert.arguments(host, LAYERS["ending"])["ending_bias"] == "unswapped"
    }
    assert unswapped == {"alphafold3"}
