"""Bad input gets one error that names argument, value, expectation and cure, while tracing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import core, mask, pair, params

import genie_tk_jax

N, C = 5, 16
Z, MASK = pair(1, N, C), mask(2, N)
WEIGHTS = {op: params(op, 3, C) for op in ("triangle_multiplication", "triangle_attention")}


def multiplication(z=Z, valid=MASK, weights=None, **how):
    weights = WEIGHTS["triangle_multiplication"] if weights is None else weights
    return genie_tk_jax.triangle_multiplication(
        z, valid, weights, **{"direction": "outgoing", **how}
    )


def attention(z=Z, valid=MASK, weights=None, **how):
    weights = WEIGHTS["triangle_attention"] if weights is None else weights
    return genie_tk_jax.triangle_attention(z, valid, weights, **{"node": "starting", **how})


LAYERS = [multiplication, attention]


def refused(error, call, *parts):
    """`call` raises `error` also while it is traced, with all of `parts` in its message."""
    with pytest.raises(error) as eager:
        call()
    with pytest.raises(error):
        jax.eval_shape(call)
    for part in parts:
        assert re.search(part, str(eager.value)), f"{part!r} is not in: {eager.value}"


def changed(op, group, name, value):
    tree = {key: dict(leaves) for key, leaves in WEIGHTS[op].items()}
    tree.setdefault(group, {})[name] = value
    return tree


def without(op, group, name=None):
    tree = {key: dict(leaves) for key, leaves in WEIGHTS[op].items()}
    if name is None:
        del tree[group]
    else:
        del tree[group][name]
    return tree


@pytest.mark.parametrize("layer", LAYERS)
def test_z(layer):
    op = layer.__name__
    refused(ValueError, lambda: layer(Z[0, 0]), op, "z must be", "1 axes", r"\(16,\)")
    refused(ValueError, lambda: layer(Z[:, :4]), "z must be", r"\(5, 4, 16\)", "N = 4", "square")
    refused(
        TypeError, lambda: layer(Z.astype(jnp.int32)), "z must be", "bfloat16", "int32", "astype"
    )
    refused(TypeError, lambda: layer("z"), "z must be an array", "str")


@pytest.mark.parametrize("layer", LAYERS)
def test_mask(layer):
    refused(ValueError, lambda: layer(valid=MASK[:4]), "mask must be", r"\(4, 5\)", "None")
    refused(ValueError, lambda: layer(valid=MASK[None]), "mask must be", r"\(1,\)")
    refused(ValueError, lambda: layer(valid=MASK * 0.5), "mask must hold", "0.5", "mask > 0.5")
    refused(ValueError, lambda: layer(valid=np.full((N, N), np.nan)), "mask must hold", "nan")
    refused(ValueError, lambda: layer(valid=MASK * 2), "mask must hold only 0 and 1", "2")


def test_parameters_name_the_leaf():
    op = "triangle_multiplication"
    wrong = jnp.zeros((C, 7))
    cases = [
        (
            changed(op, "proj_in", "kernel", wrong),
            [r"\['proj_in'\]\['kernel'\]", r"\(16, 7\)", r"\(16, 24\)"],
        ),
        (
            without(op, "gate_out", "kernel"),
            [r"\['gate_out'\]\['kernel'\] is missing", r"\(16, 16\)"],
        ),
        (without(op, "norm_in"), [r"params\['norm_in'\] is missing", "scale"]),
        (changed(op, "norm", "scale", wrong), [r"params\['norm'\] is unknown", "norm_in"]),
        (
            changed(op, "norm_in", "offset", wrong),
            [r"\['norm_in'\]\['offset'\] is unknown", "bias"],
        ),
        (changed(op, "norm_in", "scale", "one"), [r"\['norm_in'\]\['scale'\] is a str"]),
        (changed(op, "norm_in", "scale", jnp.zeros(C, int)), ["dtype int32", "floating"]),
    ]
    for weights, parts in cases:
        cure = "init_triangle_multiplication"
        refused(
            ValueError, lambda weights=weights: multiplication(weights=weights), op, cure, *parts
        )
    refused(ValueError, lambda: multiplication(weights=[1, 2]), "params is a list")
    of_attention = WEIGHTS["triangle_attention"]
    refused(ValueError, lambda: multiplication(weights=of_attention), "norm_in'] is missing")
    other = changed("triangle_attention", "out", "kernel", jnp.zeros((12, C)))
    refused(ValueError, lambda: attention(weights=other), r"\['out'\]\['kernel'\]", r"\(3, 4, 16\)")


def test_a_missing_optional_bias_is_fine():
    weights = without("triangle_attention", "out", "bias")
    assert attention(weights=weights).shape == Z.shape


def test_names_of_settings():
    refused(
        ValueError, lambda: multiplication(direction="up"), "direction must be", "outgoing", "'up'"
    )
    refused(ValueError, lambda: attention(node="start"), "node must be", "'starting'", "'start'")
    refused(ValueError, lambda: attention(ending_bias="both"), "ending_bias must be", "'swapped'")
    for layer in LAYERS:
        refused(
            ValueError,
            lambda layer=layer: layer(implementation="triton"),
            "implementation",
            "'cuda'",
        )
    with pytest.raises(ValueError, match="init must be one of"):
        genie_tk_jax.init_triangle_multiplication(jax.random.key(0), 8, 8, init="zeros")


@pytest.mark.parametrize("layer", LAYERS)
def test_cuda_where_no_kernel_serves(layer):
    parts = [r"\(implementation='cuda'\): ", "implementation=None"]
    refused(NotImplementedError, lambda: layer(implementation="cuda"), *parts)


def test_core():
    q, k, v, bias, valid = core(1, 3, 4, 5)
    call = genie_tk_jax.pair_attention
    refused(
        ValueError, lambda: call(q, k[..., :4], v, bias, valid), "k must be", "D = 4", "q has D = 8"
    )
    refused(ValueError, lambda: call(q, k, v[:2], bias, valid), "v must be", "I = 2", "I = 3")
    refused(ValueError, lambda: call(q, k, v, bias[:, :3], valid), "bias must be", "Q = 3", "Q = 4")
    refused(ValueError, lambda: call(q, k, v, bias, valid.T), "mask must be", "I = 5")
    refused(
        TypeError, lambda: call(q, k.astype("bfloat16"), v, bias, valid), "k must have the dtype"
    )


def test_stages():
    a = jnp.zeros((8, 3, 5))
    call = genie_tk_jax.contract
    refused(ValueError, lambda: call(a, a[:, :, :4], "outgoing"), "b must be", "K = 4", "K = 5")
    refused(ValueError, lambda: call(a, a[:, :2], "incoming"), "b must be", "K = 2", "K = 3")
    weights = WEIGHTS["triangle_multiplication"]
    t = jnp.zeros((12, N, N + 1))
    refused(ValueError, lambda: genie_tk_jax.gated_output(t, Z, weights), "t must be", "J = 6")
    only = {"norm_in": weights["norm_in"]}
    refused(
        ValueError, lambda: genie_tk_jax.gated_projection(Z, None, only), "'proj_in'] is missing"
    )
