"""Calls of the targets of triangle attention."""

from ffi_calls import Call, full, low, mask

B, N, PADDED, C, HEADS, WIDTH, PARTS = 2, 5, 8, 128, 4, 32, 3
ROWS, QUERIES = 3, 4  # of the core, which takes what is no square

_PAIRS, _ATTENDED = low(B, N, N, C), low(B, N, N, HEADS, WIDTH)
_NORM = {"norm_scale": full(C), "norm_bias": full(C)}
_KERNEL = full(C, HEADS, WIDTH)
_CORE = {
    "q": low(B, ROWS, QUERIES, HEADS, WIDTH),
    "k": low(B, ROWS, N, HEADS, WIDTH),
    "v": low(B, ROWS, N, HEADS, WIDTH),
    "bias": low(B, HEADS, QUERIES, PADDED),
    "mask": mask(B, ROWS, N),
}
_GRADIENTS = {
    **{f"d{name}": _ATTENDED for name in ("q", "k", "v", "_gate")},
    "d_bias": full(B, HEADS, N, PADDED),
}

CALLS = {
    "genie_attention_project_fwd": Call(
        {
            "z": _PAIRS,
            "mask": mask(B, N, N),
            **_NORM,
            **{f"{name}_kernel": _KERNEL for name in "qkv"},
            "bias_kernel": full(C, HEADS),
        },
        [_ATTENDED, _ATTENDED, _ATTENDED, low(B, HEADS, N, PADDED)],
        {"ending": False, "bias_as_z": False, "epsilon": 1e-5},
    ),
    "genie_pair_attention_fwd": Call(
        _CORE, [_CORE["q"], full(B, ROWS, HEADS, QUERIES)], {"folded": False}
    ),
    "genie_attention_output_fwd": Call(
        {
            "o": _ATTENDED,
            "z": _PAIRS,
            "mask": mask(B, N, N),
            **_NORM,
            "gate_kernel": _KERNEL,
            "out_kernel": full(HEADS, WIDTH, C),
            "gate_bias": full(HEADS, WIDTH),
            "out_bias": full(C),
        },
        [_PAIRS],
        {"ending": False, "residual": False, "epsilon": 1e-5},
    ),
    "genie_attention_output_bwd": Call(
        {
            "o": _ATTENDED,
            "z": _PAIRS,
            "mask": mask(B, N, N),
            "d_out": _PAIRS,
            **_NORM,
            "gate_kernel": _KERNEL,
            "out_kernel": full(HEADS, WIDTH, C),
            "gate_bias": full(HEADS, WIDTH),
        },
        [_ATTENDED, _ATTENDED, full(B, PARTS, HEADS * WIDTH, C), full(B, PARTS, C)],
        {"ending": True, "epsilon": 1e-5},
    ),
    "genie_pair_attention_bwd": Call(
        {
            **_CORE,
            "o": _CORE["q"],
            "lse": full(B, ROWS, HEADS, QUERIES),
            "d_o": _CORE["q"],
        },
        [
            *(_CORE[name] for name in "qkv"),
            full(B, HEADS, QUERIES, PADDED),
            full(B, ROWS, HEADS, 128),
            full(PARTS, B, HEADS, QUERIES, PADDED),
        ],
        {"folded": False},
    ),
    "genie_attention_project_bwd": Call(
        {
            "z": _PAIRS,
            "mask": mask(B, N, N),
            **_GRADIENTS,
            "d_out": _PAIRS,
            "norm_scale": full(C),
            **{f"{name}_kernel": _KERNEL for name in ("q", "k", "v", "gate")},
            "bias_kernel": full(C, HEADS),
        },
        [_PAIRS, full(B, N, N, 2)],
        {"ending": True, "bias_as_z": False, "epsilon": 1e-5},
    ),
    "genie_attention_weights_bwd": Call(
        {"z": _PAIRS, "statistics": full(B, N, N, 2), **_GRADIENTS},
        [
            full(B, PARTS, 4, C, HEADS * WIDTH),
            full(B, PARTS, 4, HEADS * WIDTH),
            full(B, PARTS, C, 16),
            full(B, PARTS, 16),
        ],
        {"ending": True, "bias_as_z": False},
    ),
}
