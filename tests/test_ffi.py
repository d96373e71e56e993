"""Python and C++ agree on every target, as far as a machine without a GPU can tell.

Registered for the CPU and called as Python calls it, a handler must fail to decode its first
operand, the CUDA stream, and nothing else: so all that follows has the number, dtypes and ranks
that its signature binds, and attributes have their names and types.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genie_tk_jax import _ffi


def gated_projection_fwd(**changes):
    batch, rows, columns, padded, channels, hidden = 2, 3, 5, 8, 128, 64
    operands = {
        "z": np.zeros((batch, rows, columns, channels), jnp.bfloat16),
        "mask": np.zeros((batch, rows, columns), bool),
        "norm_scale": np.zeros(channels, np.float32),
        "norm_bias": np.zeros(channels, np.float32),
        "proj_kernel": np.zeros((channels, 2 * hidden), np.float32),
        "gate_kernel": np.zeros((channels, 2 * hidden), np.float32),
        "proj_bias": np.zeros(2 * hidden, np.float32),
        "gate_bias": np.zeros(2 * hidden, np.float32),
    }
    result = jax.ShapeDtypeStruct((batch, hidden, padded, padded), jnp.bfloat16)
    attributes = {"epsilon": 1e-5}
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    return _ffi.call(
        "genie_gated_projection_fwd", (result, result), *operands.values(), **attributes
    )


def pair_attention_fwd(**changes):
    batch, rows, queries, keys, padded, heads, channels = 2, 3, 4, 5, 8, 2, 32
    operands = {
        "q": np.zeros((batch, rows, queries, heads, channels), jnp.bfloat16),
        "k": np.zeros((batch, rows, keys, heads, channels), jnp.bfloat16),
        "v": np.zeros((batch, rows, keys, heads, channels), jnp.bfloat16),
        "bias": np.zeros((batch, heads, queries, padded), jnp.bfloat16),
        "mask": np.zeros((batch, rows, keys), np.bool_),
    }
    results = (
        jax.ShapeDtypeStruct(operands["q"].shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, rows, heads, queries), jnp.float32),
    )
    attributes = {"folded": False}
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    return _ffi.call("genie_pair_attention_fwd", results, *operands.values(), **attributes)


def gated_projection_bwd(**changes):
    batch, rows, columns, padded, channels, width, parts = 2, 3, 5, 8, 128, 128, 4
    pairs = np.zeros((batch, rows, columns, channels), jnp.bfloat16)
    gradient = np.zeros((batch, width // 2, padded, padded), jnp.bfloat16)
    operands = {
        "z": pairs,
        "mask": np.zeros((batch, rows, columns), bool),
        "da": gradient,
        "db": gradient,
        "dz_in": pairs,
        "norm_scale": np.zeros(channels, np.float32),
        "norm_bias": np.zeros(channels, np.float32),
        "proj_kernel": np.zeros((channels, width), np.float32),
        "gate_kernel": np.zeros((channels, width), np.float32),
        "proj_bias": np.zeros(width, np.float32),
        "gate_bias": np.zeros(width, np.float32),
    }
    operands |= changes
    shapes = [(channels,)] * 2 + [(channels, width)] * 2 + [(width,)] * 2
    shapes += [(parts, 2, channels + 1, width)]
    results = [jax.ShapeDtypeStruct((batch, *shape), np.float32) for shape in shapes]
    return _ffi.call(
        "genie_gated_projection_bwd",
        [jax.ShapeDtypeStruct(pairs.shape, jnp.bfloat16), *results],
        *operands.values(),
        aliases=None if operands["dz_in"] is None else {4: 0},
        epsilon=1e-5,
    )


def _contraction(results, gradient, changes):
    edge = np.zeros((2, 3, 8, 16), jnp.bfloat16)
    mask = np.zeros((2, 5, 13), bool)
    operands = {"a": edge, "b": edge, **gradient, "a_mask": mask, "b_mask": mask}
    attributes = {"incoming": False}
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    results = [jax.ShapeDtypeStruct((2, 3, *sizes), jnp.bfloat16) for sizes in results]
    live = jax.ShapeDtypeStruct((4,), jnp.uint8)
    return [*results, live], [*operands.values()], attributes


def contract_fwd(**changes):
    results, operands, attributes = _contraction([(8, 8)], {}, changes)
    return _ffi.call("genie_contract_fwd", results, *operands, **attributes)


def contract_bwd(**changes):
    gradient = {"dt": np.zeros((2, 3, 8, 8), jnp.bfloat16)}
    results, operands, attributes = _contraction([(8, 16), (8, 16)], gradient, changes)
    return _ffi.call("genie_contract_bwd", results, *operands, **attributes)


def _gated_output(changes, **more):
    batch, rows, columns, padded, channels, hidden = 2, 3, 5, 8, 128, 64
    operands = {
        "z": np.zeros((batch, rows, columns, channels), jnp.bfloat16),
        "t": np.zeros((batch, hidden, padded, padded), jnp.bfloat16),
        "mask": np.zeros((batch, rows, columns), bool),
        **more,
        "norm_in_scale": np.zeros(channels, np.float32),
        "norm_in_bias": np.zeros(channels, np.float32),
        "norm_out_scale": np.zeros(hidden, np.float32),
        "norm_out_bias": np.zeros(hidden, np.float32),
        "proj_kernel": np.zeros((hidden, channels), np.float32),
        "gate_kernel": np.zeros((channels, channels), np.float32),
        "proj_bias": np.zeros(channels, np.float32),
        "gate_bias": np.zeros(channels, np.float32),
    }
    attributes = {"residual": True, "epsilon": 1e-5}
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    return operands, attributes


def gated_output_fwd(**changes):
    operands, attributes = _gated_output(changes)
    result = jax.ShapeDtypeStruct((2, 3, 5, 128), jnp.bfloat16)
    return _ffi.call("genie_gated_output_fwd", result, *operands.values(), **attributes)


def gated_output_bwd(**changes):
    operands, attributes = _gated_output(changes, d_out=np.zeros((2, 3, 5, 128), jnp.bfloat16))
    shapes = [(128,), (128,), (64,), (64,), (64, 128), (128, 128), (128,), (128,)]
    shapes += [(4, (64 + 128) * 128 + 512)]
    results = [
        jax.ShapeDtypeStruct((2, 3, 5, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 64, 8, 8), jnp.bfloat16),
        *(jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in shapes),
    ]
    return _ffi.call("genie_gated_output_bwd", results, *operands.values(), **attributes)


def _attention_stage(target, results, operands, attributes, changes):
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    results = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in results]
    return _ffi.call(target, results, *operands.values(), **attributes)


def attention_project_fwd(**changes):
    batch, n, padded, channels, heads, width = 2, 5, 8, 128, 4, 32
    operands = {
        "z": np.zeros((batch, n, n, channels), jnp.bfloat16),
        "mask": np.zeros((batch, n, n), bool),
        "norm_scale": np.zeros(channels, np.float32),
        "norm_bias": np.zeros(channels, np.float32),
        **{f"{name}_kernel": np.zeros((channels, heads, width), np.float32) for name in "qkv"},
        "bias_kernel": np.zeros((channels, heads), np.float32),
    }
    attended, bias = (batch, n, n, heads, width), (batch, heads, n, padded)
    attributes = {"ending": False, "bias_as_z": False, "epsilon": 1e-5}
    results = [attended, attended, attended, bias]
    return _attention_stage("genie_attention_project_fwd", results, operands, attributes, changes)


def attention_output_fwd(**changes):
    batch, n, channels, heads, width = 2, 5, 128, 4, 32
    operands = {
        "o": np.zeros((batch, n, n, heads, width), jnp.bfloat16),
        "z": np.zeros((batch, n, n, channels), jnp.bfloat16),
        "mask": np.zeros((batch, n, n), bool),
        "norm_scale": np.zeros(channels, np.float32),
        "norm_bias": np.zeros(channels, np.float32),
        "gate_kernel": np.zeros((channels, heads, width), np.float32),
        "out_kernel": np.zeros((heads, width, channels), np.float32),
        "gate_bias": np.zeros((heads, width), np.float32),
        "out_bias": np.zeros(channels, np.float32),
    }
    attributes = {"ending": False, "residual": False, "epsilon": 1e-5}
    results = [(batch, n, n, channels)]
    return _attention_stage("genie_attention_output_fwd", results, operands, attributes, changes)


def pair_attention_bwd(**changes):
    batch, rows, queries, keys, padded, heads, channels = 2, 3, 4, 5, 8, 2, 32
    query_side = np.zeros((batch, rows, queries, heads, channels), jnp.bfloat16)
    key_side = np.zeros((batch, rows, keys, heads, channels), jnp.bfloat16)
    bias = np.zeros((batch, heads, queries, padded), jnp.bfloat16)
    operands = {
        "q": query_side,
        "k": key_side,
        "v": key_side,
        "bias": bias,
        "mask": np.zeros((batch, rows, keys), bool),
        "o": query_side,
        "lse": np.zeros((batch, rows, heads, queries), np.float32),
        "d_o": query_side,
    }
    results = [jax.ShapeDtypeStruct(operands[name].shape, jnp.bfloat16) for name in "qkv"]
    sums = [bias.shape, (batch, rows, heads, 2, 64), (3, *bias.shape)]
    results += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]
    attributes = {"folded": False}
    for name, value in changes.items():
        (operands if name in operands else attributes)[name] = value
    return _ffi.call("genie_pair_attention_bwd", results, *operands.values(), **attributes)


def attention_output_bwd(**changes):
    batch, n, channels, heads, width, parts = 2, 5, 128, 4, 32, 3
    pairs = np.zeros((batch, n, n, channels), jnp.bfloat16)
    attended = np.zeros((batch, n, n, heads, width), jnp.bfloat16)
    operands = {
        "o": attended,
        "z": pairs,
        "mask": np.zeros((batch, n, n), bool),
        "d_out": pairs,
        "norm_scale": np.zeros(channels, np.float32),
        "norm_bias": np.zeros(channels, np.float32),
        "gate_kernel": np.zeros((channels, heads, width), np.float32),
        "out_kernel": np.zeros((heads, width, channels), np.float32),
        "gate_bias": np.zeros((heads, width), np.float32),
    }
    sums = [(batch, parts, heads * width, channels), (batch, parts, channels)]
    results = [jax.ShapeDtypeStruct(attended.shape, jnp.bfloat16)] * 2
    results += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums]
    operands |= changes
    return _ffi.call(
        "genie_attention_output_bwd", results, *operands.values(), ending=True, epsilon=1e-5
    )


def _projection_gradients(first):
    batch, n, padded, channels, heads, width = 2, 5, 8, 128, 4, 32
    attended = np.zeros((batch, n, n, heads, width), jnp.bfloat16)
    return {
        "z": np.zeros((batch, n, n, channels), jnp.bfloat16),
        **first,
        **{f"d{name}": attended for name in ("q", "k", "v", "_gate")},
        "d_bias": np.zeros((batch, heads, n, padded), np.float32),
    }


def attention_project_bwd(**changes):
    channels, heads, width = 128, 4, 32
    kernel = np.zeros((channels, heads, width), np.float32)
    operands = {
        **_projection_gradients({"mask": np.zeros((2, 5, 5), bool)}),
        "d_out": np.zeros((2, 5, 5, channels), jnp.bfloat16),
        "norm_scale": np.zeros(channels, np.float32),
        **{f"{name}_kernel": kernel for name in ("q", "k", "v", "gate")},
        "bias_kernel": np.zeros((channels, heads), np.float32),
        **changes,
    }
    results = [
        jax.ShapeDtypeStruct((2, 5, 5, channels), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 5, 5, 2), jnp.float32),
    ]
    attributes = {"ending": True, "bias_as_z": False, "epsilon": 1e-5}
    return _ffi.call("genie_attention_project_bwd", results, *operands.values(), **attributes)


def attention_weights_bwd(**changes):
    operands = _projection_gradients({"statistics": np.zeros((2, 5, 5, 2), np.float32)})
    operands |= changes
    shapes = [(2, 3, 4, 128, 128), (2, 3, 4, 128), (2, 3, 128, 16), (2, 3, 16)]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    attributes = {"ending": True, "bias_as_z": False}
    return _ffi.call("genie_attention_weights_bwd", results, *operands.values(), **attributes)


CALLS = {
    "genie_gated_projection_fwd": gated_projection_fwd,
    "genie_pair_attention_fwd": pair_attention_fwd,
    "genie_gated_projection_bwd": gated_projection_bwd,
    "genie_contract_fwd": contract_fwd,
    "genie_contract_bwd": contract_bwd,
    "genie_gated_output_fwd": gated_output_fwd,
    "genie_gated_output_bwd": gated_output_bwd,
    "genie_attention_project_fwd": attention_project_fwd,
    "genie_attention_output_fwd": attention_output_fwd,
    "genie_pair_attention_bwd": pair_attention_bwd,
    "genie_attention_output_bwd": attention_output_bwd,
    "genie_attention_project_bwd": attention_project_bwd,
    "genie_attention_weights_bwd": attention_weights_bwd,
}


@pytest.fixture(scope="module")
def targets():
    if not _ffi.AVAILABLE:
        assert not os.environ.get("GENIE_EXPECT_KERNELS"), _ffi.WHY_ABSENT
        pytest.skip(str(_ffi.WHY_ABSENT))
    for name, handler in _ffi.TARGETS.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return _ffi.TARGETS


def refused_operands(call, **arguments) -> list[int]:
    """Which of its parameters, the stream being 0, a handler could not decode."""
    decoding = pytest.raises(Exception, match="Failed to decode all FFI handler operands")
    with jax.default_device(jax.devices("cpu")[0]), decoding as failure:
        jax.block_until_ready(jax.jit(lambda: call(**arguments))())
    (numbers,) = re.findall(r"bad operands at: ([\d, ]+)\)", str(failure.value))
    return [int(number) for number in numbers.split(",")]


def test_every_target_is_tested_here(targets):
    assert set(targets) == set(CALLS)
    assert _ffi.COMPUTE_CAPABILITIES


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_only_the_stream_is_missing_on_the_cpu(targets, call):
    assert refused_operands(call) == [0]


@pytest.mark.parametrize(
    ("call", "absent"),
    [
        (gated_projection_fwd, ("mask",)),
        (gated_projection_fwd, ("proj_bias", "gate_bias")),
        (gated_projection_bwd, ("mask", "dz_in")),
        (gated_output_fwd, ("mask", "proj_bias")),
        (gated_output_bwd, ("mask", "gate_bias")),
        (contract_fwd, ("a_mask",)),
        (contract_bwd, ("a_mask", "b_mask")),
        (attention_project_fwd, ("mask",)),
        (attention_output_fwd, ("mask",)),
        (attention_output_fwd, ("gate_bias", "out_bias")),
        (attention_output_bwd, ("mask", "gate_bias")),
        (attention_project_bwd, ("mask", "d_out")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value),
)
def test_operands_may_be_absent(targets, call, absent):
    assert refused_operands(call, **dict.fromkeys(absent)) == [0]


@pytest.mark.parametrize("call", [pair_attention_fwd, pair_attention_bwd])
@pytest.mark.parametrize("absent", ["bias", "mask"])
def test_operands_of_attention_may_be_absent(targets, call, absent):
    assert refused_operands(call, **{absent: None}) == [0]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"mask": np.zeros((2, 3, 5), np.float32)}, 2),
        ({"mask": np.zeros((2, 3), bool)}, 2),
        ({"norm_bias": np.zeros(128, jnp.bfloat16)}, 4),
        ({"proj_bias": np.zeros(128, jnp.bfloat16)}, 7),
        ({"epsilon": 1}, 11),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_the_contract_test_can_fail(targets, changes, refused):
    assert refused_operands(gated_projection_fwd, **changes) == [0, refused]


def test_an_attribute_of_attention_is_bool(targets):
    assert refused_operands(pair_attention_fwd, folded=1.0) == [0, 8]


@pytest.mark.parametrize("enable_x64", [False, True])
def test_attributes_have_one_type_whatever_jax_is_set_to(enable_x64):
    result = jax.ShapeDtypeStruct((), np.float32)

    def call():
        return _ffi.call("not_registered", result, length=3, epsilon=0.5, exact=True, kind="a")

    with jax.enable_x64(enable_x64):
        text = jax.jit(call).lower().as_text()
    for attribute in ("length = 3 : i64", "epsilon = 5.000000e-01 : f32", "exact = true"):
        assert attribute in text
    assert 'kind = "a"' in text


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": np.zeros((2, 3, 5, 128), np.float32)}, "z must be bfloat16 or float16"),
        ({"z": np.zeros((3, 5, 128), jnp.bfloat16)}, "z and a must have 4 dimensions"),
        (
            {"mask": np.zeros((2, 5, 3), bool)},
            r"mask must have shape \[2, 3, 5\]; got \[2, 5, 3\]",
        ),
        ({"norm_bias": np.zeros(64, np.float32)}, r"norm_bias must have shape \[128\]; got \[64\]"),
        ({"gate_kernel": np.zeros((128, 128), jnp.bfloat16)}, "must both be float32 or z's dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_handler_refuses_in_words_and_lives_on(targets, changes, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(lambda: gated_projection_fwd(**changes))())
    jax.block_until_ready(jax.jit(gated_projection_fwd)())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.zeros((2, 3, 5), np.float32)}, "mask must be bool or uint8"),
        ({"bias": np.zeros((2, 2, 4, 8), np.float32)}, "k, v, bias and o must have q's dtype"),
        ({"bias": np.zeros((2, 2, 4, 5), jnp.bfloat16)}, r"bias must have shape \[2, 2, 4, 8\]"),
    ],
    ids=["mask", "bias-dtype", "bias-shape"],
)
def test_attention_refuses_in_words_and_lives_on(targets, changes, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(lambda: pair_attention_fwd(**changes))())
    jax.block_until_ready(jax.jit(pair_attention_fwd)())
