"""What a workload costs at the least: counted FLOPs and bytes, and what a card can do at most."""

from collections.abc import Callable
from typing import NamedTuple

PASSES = ("fwd", "fwd+bwd")


class Ceiling(NamedTuple):
    """The most that a card was seen to do.

    bytes_per_second: a device-to-device copy, bytes read plus bytes written.
    flops_per_second: a large matrix product with 16-bit operands.
    """

    bytes_per_second: float
    flops_per_second: float


# By the name that JAX gives the device. Cards that are not here get no shares.
CEILINGS = {
    "NVIDIA H100 80GB HBM3": Ceiling(3.02e12, 790e12),
    "NVIDIA H200": Ceiling(4.3e12, 790e12),
}


class Sizes(NamedTuple):
    """n residues, channels of z (and of all heads, and of a, b and t), attention heads."""

    n: int
    channels: int
    heads: int

    @property
    def width(self) -> int:
        """Channels of one head."""
        return self.channels // self.heads


class Cost(NamedTuple):
    """Counts for sizes n, c (channels) and h (heads).

    flops: of the matrix products alone, two for a multiplication with its addition.
    backward_flops: as a multiple of `flops`: 2 for a linear map; 2.5 for the attention core, whose
      logits do not fit in memory and are computed again.
    elements, backward_elements: numbers that have to move between the chip and its memory. Each
      stage reads its operands and writes its results once; a layer is the sum of its stages.
      Masks, weights and statistics, a few per cent at most, are left out.
    """

    flops: Callable[[int, int, int], float]
    backward_flops: float
    elements: Callable[[int, int, int], float]
    backward_elements: Callable[[int, int, int], float]


STAGE_COSTS = {
    "gated_projection": Cost(
        lambda n, c, h: 8 * n**2 * c**2,
        2,
        lambda n, c, h: 3 * n**2 * c,  # z; a, b
        lambda n, c, h: 5 * n**2 * c,  # z, da, db, dz of the output stage; dz
    ),
    "contract": Cost(
        lambda n, c, h: 2 * n**3 * c,
        2,
        lambda n, c, h: 3 * n**2 * c,  # a, b; t
        lambda n, c, h: 5 * n**2 * c,  # a, b, dt; da, db
    ),
    "gated_output": Cost(
        lambda n, c, h: 4 * n**2 * c**2,
        2,
        lambda n, c, h: 3 * n**2 * c,  # z, t; the update
        lambda n, c, h: 5 * n**2 * c,  # z, t, d_out; dz, dt
    ),
    "attention_project": Cost(
        lambda n, c, h: 2 * n**2 * c * (3 * c + h),
        2,
        lambda n, c, h: n**2 * (4 * c + h),  # z; q, k, v, bias
        lambda n, c, h: n**2 * (6 * c + h),  # z, dq, dk, dv, dz of the output stage, dbias; dz
    ),
    "attention_core": Cost(
        lambda n, c, h: 4 * n**3 * c,
        2.5,
        lambda n, c, h: n**2 * (4 * c + h),  # q, k, v, bias; o
        lambda n, c, h: n**2 * (8 * c + 2 * h),  # q, k, v, bias, o, do; dq, dk, dv, dbias
    ),
    "attention_output": Cost(
        lambda n, c, h: 4 * n**2 * c**2,
        2,
        lambda n, c, h: 3 * n**2 * c,  # o, z; the update
        lambda n, c, h: 5 * n**2 * c,  # o, z, d_out; do, dz
    ),
}
LAYER_STAGES = {
    "multiplication": ("gated_projection", "contract", "gated_output"),
    "attention": ("attention_project", "attention_core", "attention_output"),
}


def counted(kind: str, sizes: Sizes, which: str, itemsize: int) -> tuple[float, float]:
    """FLOPs and bytes of one call of a layer or stage, for the pass `which`."""
    backward, at = which == "fwd+bwd", (sizes.n, sizes.channels, sizes.heads)
    flops = elements = 0.0
    for stage in LAYER_STAGES.get(kind, (kind,)):
        cost = STAGE_COSTS[stage]
        flops += cost.flops(*at) * (1 + cost.backward_flops * backward)
        elements += cost.elements(*at) + cost.backward_elements(*at) * backward
    return flops, elements * itemsize
