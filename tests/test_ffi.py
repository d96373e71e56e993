"""Python and C++ agree on every target, as far as a machine without a GPU can tell.

Registered for the CPU and called as Python calls it, a handler must fail to decode its first
operand, the CUDA stream, and nothing else: so all that follows has the number, dtypes and ranks
that its signature binds, and attributes have their names and types.
"""

import os
import re

import ffi_attention
import ffi_multiplication
import jax
import numpy as np
import pytest
from ffi_calls import full, low, mask

from genie_tk_jax import _ffi

CALLS = ffi_multiplication.CALLS | ffi_attention.CALLS


@pytest.fixture(scope="module")
def targets():
    if not _ffi.AVAILABLE:
        assert not os.environ.get("GENIE_EXPECT_KERNELS"), _ffi.WHY_ABSENT
        pytest.skip(str(_ffi.WHY_ABSENT))
    for name, handler in _ffi.TARGETS.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return _ffi.TARGETS


def run(target, **changes):
    return jax.block_until_ready(jax.jit(lambda: CALLS[target].run(target, **changes))())


def refused_operands(target, **changes) -> list[int]:
    """Which of its parameters, the stream being 0, a handler could not decode."""
    decoding = pytest.raises(Exception, match="Failed to decode all FFI handler operands")
    with jax.default_device(jax.devices("cpu")[0]), decoding as failure:
        run(target, **changes)
    (numbers,) = re.findall(r"bad operands at: ([\d, ]+)\)", str(failure.value))
    return [int(number) for number in numbers.split(",")]


def test_every_target_is_tested_here(targets):
    assert set(targets) == set(CALLS)
    assert _ffi.COMPUTE_CAPABILITIES


@pytest.mark.parametrize("target", CALLS)
def test_only_the_stream_is_missing_on_the_cpu(targets, target):
    assert refused_operands(target) == [0]


@pytest.mark.parametrize(
    ("target", "absent"),
    [
        ("genie_gated_projection_fwd", ("mask",)),
        ("genie_gated_projection_fwd", ("proj_bias", "gate_bias")),
        ("genie_gated_projection_bwd", ("mask", "dz_in", "aliases")),
        ("genie_gated_output_fwd", ("mask", "proj_bias")),
        ("genie_gated_output_bwd", ("mask", "gate_bias")),
        ("genie_contract_fwd", ("a_mask",)),
        ("genie_contract_bwd", ("a_mask", "b_mask")),
        ("genie_attention_project_fwd", ("mask",)),
        ("genie_attention_output_fwd", ("mask",)),
        ("genie_attention_output_fwd", ("gate_bias", "out_bias")),
        ("genie_attention_output_bwd", ("mask", "gate_bias")),
        ("genie_attention_project_bwd", ("mask", "d_out")),
        ("genie_pair_attention_fwd", ("bias",)),
        ("genie_pair_attention_fwd", ("mask",)),
        ("genie_pair_attention_bwd", ("bias",)),
        ("genie_pair_attention_bwd", ("mask",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_operands_may_be_absent(targets, target, absent):
    assert refused_operands(target, **dict.fromkeys(absent)) == [0]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"mask": full(2, 3, 5)}, 2),
        ({"mask": mask(2, 3)}, 2),
        ({"norm_bias": low(128)}, 4),
        ({"proj_bias": low(128)}, 7),
        ({"epsilon": 1}, 11),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_the_contract_test_can_fail(targets, changes, refused):
    assert refused_operands("genie_gated_projection_fwd", **changes) == [0, refused]


def test_an_attribute_of_attention_is_bool(targets):
    assert refused_operands("genie_pair_attention_fwd", folded=1.0) == [0, 8]


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
    ("target", "changes", "message"),
    [
        (
            "genie_gated_projection_fwd",
            {"z": full(2, 3, 5, 128)},
            "z must be bfloat16 or float16",
        ),
        (
            "genie_gated_projection_fwd",
            {"z": low(3, 5, 128)},
            "z and a must have 4 dimensions",
        ),
        (
            "genie_gated_projection_fwd",
            {"mask": mask(2, 5, 3)},
            r"mask must have shape \[2, 3, 5\]; got \[2, 5, 3\]",
        ),
        (
            "genie_gated_projection_fwd",
            {"norm_bias": full(64)},
            r"norm_bias must have shape \[128\]; got \[64\]",
        ),
        (
            "genie_gated_projection_fwd",
            {"gate_kernel": low(128, 128)},
            "must both be float32 or z's dtype",
        ),
        ("genie_pair_attention_fwd", {"mask": full(2, 3, 5)}, "mask must be bool or uint8"),
        (
            "genie_pair_attention_fwd",
            {"bias": full(2, 4, 4, 8)},
            "k, v, bias and o must have q's dtype",
        ),
        (
            "genie_pair_attention_fwd",
            {"bias": low(2, 4, 4, 5)},
            r"bias must have shape \[2, 4, 4, 8\]",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_handler_refuses_in_words_and_lives_on(targets, target, changes, message):
    with pytest.raises(Exception, match=message):
        run(target, **changes)
    run(target)
