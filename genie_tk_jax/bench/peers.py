"""Adapters to other libraries: each makes a peer compute the same function as we do.

What they disagree on, and the adapters settle: cuEquivariance keeps weights as [out, in] and needs
as many hidden channels as z has; tokamax takes the operands of the incoming direction in the order
of AlphaFold 2 (b first), its epsilon is 1e-6 unless told, and it has no batch axis. Only public
Python functions are called.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genie_tk_jax.bench import colabfold, plain
from genie_tk_jax.bench.contestants import Contestant
from genie_tk_jax.bench.costs import Sizes
from genie_tk_jax.bench.workloads import Workload

EPSILON = plain.EPSILON
ATTENTION = ("attention", "attention_core")


class Peer(NamedTuple):
    """A library to compare with.

    kinds: the workloads that it serves.
    package: whose version a report names.
    build(name, workload, sizes, dtype) gives the contestant. It raises ImportError where the
      library is missing; refusals may come then or when the contestant is traced, compiled or run.
    """

    kinds: tuple[str, ...]
    packages: tuple[str, ...]
    build: Callable[[str, Workload, Sizes, str], Contestant]


def _attention(name: str, workload: Workload, attend: plain.Core) -> Contestant:
    """A core in the attention core's own workload, or with plain XLA round it in the layer's."""
    if workload.kind == "attention_core":
        return Contestant(name, lambda inputs, mask: attend(**inputs, mask=mask))

    def call(inputs, mask):
        return plain.attention(inputs["z"], mask, inputs["params"], workload.setting, attend)

    return Contestant(name, call)


# jax.nn, which calls cuDNN


def _cudnn(name, workload, sizes, dtype):
    def attend(q, k, v, bias, mask):
        return jax.nn.dot_product_attention(
            q, k, v, bias[None], mask[:, None, None, :], implementation="cudnn"
        )

    return _attention(name, workload, attend)


# cuequivariance_jax


def _cuequivariance(name, workload, sizes, dtype):
    library = importlib.import_module("cuequivariance_jax")
    if importlib.util.find_spec("cuequivariance_ops_jax") is None:
        raise ImportError("cuequivariance_ops_jax, which holds the kernels, is not installed")
    if workload.kind == "multiplication":
        call = partial(library.triangle_multiplicative_update, direction=workload.setting)
        return Contestant(
            name,
            lambda inputs, mask: call(**inputs, mask=mask, eps=EPSILON),
            _cuequivariance_inputs,
            lambda mask: mask.astype(dtype),
        )
    attend = library.triangle_attention
    if workload.kind == "attention":
        return _attention(name, workload, partial(_cuequivariance_attend, attend))

    def core(inputs, mask):
        return attend(**inputs, mask=mask, scale=sizes.width**-0.5)[0]

    # Kept as it wants them: [B, I, H, S, D], bias [B, 1, H, Q, K], mask [B, I, 1, 1, K].
    return Contestant(
        name,
        core,
        lambda inputs: {
            "bias": inputs["bias"][None, None],
            **{key: jnp.swapaxes(inputs[key], 1, 2)[None] for key in "qkv"},
        },
        lambda mask: mask[None, :, None, None, :],
        lambda out: jnp.swapaxes(out[0], 1, 2),
    )


def _cuequivariance_inputs(inputs):
    params, dtype = inputs["params"], inputs["z"].dtype
    found = {"x": inputs["z"]}
    for group, theirs in (("norm_in", "norm_in"), ("norm_out", "norm_out")):
        found[f"{theirs}_weight"] = params[group]["scale"].astype(dtype)
        found[f"{theirs}_bias"] = params[group]["bias"].astype(dtype)
    for group, theirs in {
        "proj_in": "p_in",
        "gate_in": "g_in",
        "proj_out": "p_out",
        "gate_out": "g_out",
    }.items():
        found[f"{theirs}_weight"] = params[group]["kernel"].T
    return found


def _cuequivariance_attend(attend, q, k, v, bias, mask):
    q, k, v = (jnp.swapaxes(x, 1, 2)[None] for x in (q, k, v))
    mask = mask[None, :, None, None, :]
    out = attend(q, k, v, bias[None, None], mask, scale=q.shape[-1] ** -0.5)[0]
    return jnp.swapaxes(out[0], 1, 2)


# tokamax


def _tokamax(name, workload, sizes, dtype, *, implementation):
    library = importlib.import_module("tokamax")
    if workload.kind != "multiplication":

        def attend(q, k, v, bias, mask):
            return library.dot_product_attention(
                q, k, v, bias[None], mask[:, None, None, :], implementation=implementation
            )

        return _attention(name, workload, attend)

    def call(inputs, mask):
        return library.triangle_multiplication(
            mask=mask,
            triangle_type=workload.setting,
            epsilon=EPSILON,
            implementation=implementation,
            **inputs,
        )

    return Contestant(name, call, partial(_tokamax_inputs, incoming=workload.setting == "incoming"))


def _tokamax_inputs(inputs, *, incoming: bool) -> dict[str, Any]:
    params = inputs["params"]

    def halves(kernel):
        pair = kernel.reshape(kernel.shape[0], 2, -1)
        return pair[:, ::-1] if incoming else pair

    return {
        "x": inputs["z"],
        "projection_in_weights": halves(params["proj_in"]["kernel"]),
        "gate_in_weights": halves(params["gate_in"]["kernel"]),
        "projection_out_weights": params["proj_out"]["kernel"],
        "gate_out_weights": params["gate_out"]["kernel"],
        "layernorm_in_scale": params["norm_in"]["scale"],
        "layernorm_in_offset": params["norm_in"]["bias"],
        "layernorm_out_scale": params["norm_out"]["scale"],
        "layernorm_out_offset": params["norm_out"]["bias"],
    }


def _tokamax_with(implementation: str | None) -> Callable[..., Contestant]:
    return partial(_tokamax, implementation=implementation)


_CUEQUIVARIANCE = tuple(
    f"cuequivariance{end}" for end in ("-jax", "-ops-jax-cu12", "-ops-jax-cu13")
)

PEERS = {
    "cudnn": Peer(ATTENTION, ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"), _cudnn),
    "cuequivariance": Peer(("multiplication", *ATTENTION), _CUEQUIVARIANCE, _cuequivariance),
    # Of triangle multiplication it has one implementation, its default, which is XLA.
    "tokamax": Peer(("multiplication",), ("tokamax",), _tokamax_with(None)),
    "tokamax-triton": Peer(ATTENTION, ("tokamax",), _tokamax_with("triton")),
    "tokamax-mosaic": Peer(ATTENTION, ("tokamax",), _tokamax_with("mosaic")),
    "colabfold": Peer(("multiplication", *ATTENTION), ("colabfold-kernels",), colabfold.contestant),
}
