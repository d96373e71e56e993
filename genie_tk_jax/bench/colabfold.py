"""Adapter to colabfold-kernels, whose selectors return a kernel, or None where they have none.

Its projections take biases, which are zeros here. Only the kernels are its own: the contraction of
triangle multiplication is XLA's, as it is in ColabFold.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from genie_tk_jax.bench.contestants import Contestant
from genie_tk_jax.bench.costs import Sizes
from genie_tk_jax.bench.plain import EPSILON
from genie_tk_jax.bench.workloads import Workload


def contestant(name: str, workload: Workload, sizes: Sizes, dtype: str) -> Contestant:
    """The contestant for a triangle layer or the attention core.

    Raises:
      ImportError: colabfold-kernels is not installed.
      NotImplementedError: it has no kernel for these sizes and this dtype.
    """
    package = importlib.import_module("colabfold_kernels")
    fused = importlib.import_module("colabfold_kernels.fused_ops")
    select = partial(_select, fused, package.dispatch(), jnp.dtype(dtype))
    if workload.kind == "multiplication":
        return _multiplication(name, workload.setting, sizes, select)
    if workload.kind == "attention":
        return _layer(name, workload.setting, sizes, select)
    attend = select("attention", sizes.width, sizes.width, layout="seq")

    def core(inputs, mask):
        q, k, v, bias = (inputs[key] for key in ("q", "k", "v", "bias"))
        return attend(q, k, v, mask, bias, sizes.width**-0.5)

    return Contestant(name, core, mask=partial(_additive, dtype=dtype))


def _select(fused: Any, config: Any, dtype: Any, selector: str, *widths: int, **options: Any):
    kernel = getattr(fused, selector)(config, dtype, *widths, **options)
    if kernel is None:
        raise NotImplementedError(f"{selector} has no kernel for {dtype} and widths {widths}")
    return kernel


def _additive(mask, *, dtype):
    """[I, 1, 1, K], 0 where valid and far below elsewhere."""
    return jnp.where(mask, 0.0, -1e4).astype(dtype)[:, None, None, :]


def _multiplication(name: str, direction: str, sizes: Sizes, select: Callable) -> Contestant:
    project = select("ln_gated_dual_proj", sizes.channels, sizes.channels)
    finish = select("trimul_epilogue_ln")
    equation = {"outgoing": "hik,hjk->hij", "incoming": "hki,hkj->hij"}[direction]

    def call(inputs, mask):
        z, params = inputs["z"], inputs["params"]
        flat = z.reshape(-1, sizes.channels)
        none = jnp.zeros(2 * sizes.channels, z.dtype)
        norms = [params[group][leaf] for group in ("norm_in", "norm_out") for leaf in NORM_LEAVES]
        kernels = {name: leaves["kernel"] for name, leaves in params.items() if "kernel" in leaves}
        halves = project(
            flat,
            *norms[:2],
            kernels["proj_in"],
            none,
            kernels["gate_in"],
            none,
            mask.reshape(-1),
            eps=EPSILON,
        )
        a, b = (half.reshape(-1, sizes.n, sizes.n) for half in halves)
        t = jnp.einsum(equation, a, b).reshape(sizes.channels, -1)
        none = none[: sizes.channels]
        outputs = (kernels["proj_out"], none, kernels["gate_out"], none)
        return finish(t, flat, *norms, *outputs, eps=EPSILON).reshape(z.shape)

    return Contestant(name, call, mask=lambda mask: mask.astype(jnp.float32))


NORM_LEAVES = ("scale", "bias")


def _layer(name: str, node: str, sizes: Sizes, select: Callable) -> Contestant:
    project = select("ln_projection", sizes.channels, sizes.channels)
    attend = select("packed_attention", sizes.width, sizes.width)
    finish = select("output_projection", sizes.channels, sizes.channels)
    heads, ending = (sizes.heads, sizes.width), node == "ending"

    def call(inputs, mask):
        z, weights = inputs["z"], inputs["weights"]
        norm = (weights["scale"], weights["bias"])
        packed, bias = project(
            z.reshape(-1, sizes.channels), *norm, weights["qkvg"], weights["pair"], eps=EPSILON
        )
        packed = packed.reshape(sizes.n, sizes.n, 4, *heads)
        bias = bias.reshape(-1, sizes.n, sizes.n)
        # Of query i and key k the bias is that of the pair (k, i) at the ending node.
        bias = jnp.swapaxes(bias, 1, 2) if ending else bias
        ungated = jnp.zeros(heads, z.dtype)
        scale = sizes.width**-0.5
        o = attend(packed, bias, mask, ungated, sm_scale=scale, column=ending)
        flat = o.reshape(-1, sizes.channels)
        return finish(flat, weights["out"], jnp.zeros(sizes.channels, z.dtype)).reshape(z.shape)

    return Contestant(name, call, _layer_inputs, lambda mask: mask.T if ending else mask)


def _layer_inputs(inputs):
    params = inputs["params"]
    channels = inputs["z"].shape[-1]
    packed = [params[name]["kernel"].reshape(channels, -1) for name in ("q", "k", "v", "gate")]
    weights = {
        **params["norm"],
        "pair": params["pair_bias"]["kernel"],
        "qkvg": jnp.stack(packed),
        "out": params["out"]["kernel"].reshape(-1, channels),
    }
    return {"z": inputs["z"], "weights": weights}
