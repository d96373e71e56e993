"""Calls of the targets of triangle multiplication."""

import numpy as np
from ffi_calls import Call, full, low, mask

B, ROWS, COLUMNS, PADDED, C, HIDDEN = 2, 3, 5, 8, 128, 64

# Of the gated projection, which makes a and b at once.
_PROJECTION = {
    "norm_scale": full(C),
    "norm_bias": full(C),
    "proj_kernel": full(C, 2 * HIDDEN),
    "gate_kernel": full(C, 2 * HIDDEN),
    "proj_bias": full(2 * HIDDEN),
    "gate_bias": full(2 * HIDDEN),
}
_EDGES = low(B, HIDDEN, PADDED, PADDED)


def _contraction(results, gradient):
    edge, valid = low(2, 3, 8, 16), mask(2, 5, 13)
    operands = {"a": edge, "b": edge, **gradient, "a_mask": valid, "b_mask": valid}
    return Call(operands, [*results, np.zeros(4, np.uint8)], {"incoming": False})


def _gated_output(results, gradient):
    operands = {
        "z": low(B, ROWS, COLUMNS, C),
        "t": _EDGES,
        "mask": mask(B, ROWS, COLUMNS),
        **gradient,
        "norm_in_scale": full(C),
        "norm_in_bias": full(C),
        "norm_out_scale": full(HIDDEN),
        "norm_out_bias": full(HIDDEN),
        "proj_kernel": full(HIDDEN, C),
        "gate_kernel": full(C, C),
        "proj_bias": full(C),
        "gate_bias": full(C),
    }
    return Call(operands, results, {"residual": True, "epsilon": 1e-5})


CALLS = {
    "genie_gated_projection_fwd": Call(
        {"z": low(B, ROWS, COLUMNS, C), "mask": mask(B, ROWS, COLUMNS), **_PROJECTION},
        [_EDGES, _EDGES],
        {"epsilon": 1e-5},
    ),
    "genie_gated_projection_bwd": Call(
        {
            "z": low(B, ROWS, COLUMNS, C),
            "mask": mask(B, ROWS, COLUMNS),
            "da": _EDGES,
            "db": _EDGES,
            "dz_in": low(B, ROWS, COLUMNS, C),
            **_PROJECTION,
        },
        [
            low(B, ROWS, COLUMNS, C),
            *(full(B, *gradient.shape) for gradient in _PROJECTION.values()),
            full(B, 4, 2, C + 1, 2 * HIDDEN),
        ],
        {"epsilon": 1e-5, "aliases": {4: 0}},
    ),
    "genie_contract_fwd": _contraction([low(2, 3, 8, 8)], {}),
    "genie_contract_bwd": _contraction(
        [low(2, 3, 8, 16), low(2, 3, 8, 16)], {"dt": low(2, 3, 8, 8)}
    ),
    "genie_gated_output_fwd": _gated_output([low(B, ROWS, COLUMNS, C)], {}),
    "genie_gated_output_bwd": _gated_output(
        [
            low(B, ROWS, COLUMNS, C),
            _EDGES,
            *(full(B, C) for _ in range(2)),
            *(full(B, HIDDEN) for _ in range(2)),
            full(B, HIDDEN, C),
            full(B, C, C),
            *(full(B, C) for _ in range(2)),
            full(B, 4, (HIDDEN + C) * C + 512),
        ],
        {"d_out": low(B, ROWS, COLUMNS, C)},
    ),
}
