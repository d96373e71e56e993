"""What is timed: the inputs of each workload, and how we and a user without us compute it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import genie_tk_jax
from genie_tk_jax.bench import plain
from genie_tk_jax.bench.costs import PASSES, Sizes
from genie_tk_jax.ops import (
    attention_stages,
    gated_output,
    gated_projection,
    triangle_attention,
)

EPSILON = 1e-5


class Problem(NamedTuple):
    """What every contestant gets: floating inputs, all differentiated, and bool [N, N]."""

    inputs: dict[str, Any]
    mask: jax.Array

    def widened(self) -> "Problem":
        """The same problem in float32."""
        return Problem(jax.tree.map(lambda x: x.astype(jnp.float32), self.inputs), self.mask)


class Workload(NamedTuple):
    """One line of the benchmark.

    kind: a layer or stage, of which `setting` says the direction or node.
    draw(key, sizes, dtype) gives the inputs.
    ours(inputs, mask, implementation) is this library.
    plain(inputs, mask) is what a user without the library would write, or None where that is
      the same as `ours` with implementation='xla'.
    """

    kind: str
    setting: str
    draw: Callable[[jax.Array, Sizes, Any], dict[str, Any]]
    ours: Callable[..., Any]
    plain: Callable[..., Any] | None
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.setting}" if self.setting else self.kind


def pose(workload: Workload, sizes: Sizes, dtype: str, masked: float, seed: int = 0) -> Problem:
    """Random inputs and a random mask of which a share `masked` is zero, never on the diagonal."""
    inputs_key, mask_key = jax.random.split(jax.random.key(seed))
    valid = jax.random.uniform(mask_key, (sizes.n, sizes.n)) >= masked
    mask = valid | jnp.eye(sizes.n, dtype=bool)
    return Problem(workload.draw(inputs_key, sizes, jnp.dtype(dtype)), mask)


def _normal(key, shape, dtype):
    return jax.random.normal(key, shape).astype(dtype)


def _pair(key, sizes, dtype):
    """z of size one, with a mean of its own in every pair."""
    values, mean = jax.random.split(key)
    shape = (sizes.n, sizes.n, sizes.channels)
    z = jax.random.normal(values, shape) + jax.random.normal(mean, (*shape[:2], 1)) / 2
    return z.astype(dtype)


def _params(key, sizes, dtype, groups, *, attention):
    if attention:
        init, widths = genie_tk_jax.init_triangle_attention, (sizes.width, sizes.heads)
    else:
        init, widths = genie_tk_jax.init_triangle_multiplication, (sizes.channels,)
    params = init(key, sizes.channels, *widths, use_bias=False, init="random")
    return {
        group: leaves if group.startswith("norm") else jax.tree.map(partial(_cast, dtype), leaves)
        for group, leaves in params.items()
        if groups is None or group in groups
    }


def _cast(dtype, x):
    return x.astype(dtype)


def _draw_pair(key, sizes, dtype, *, attention, groups=None):
    first, second = jax.random.split(key)
    params = _params(second, sizes, dtype, groups, attention=attention)
    return {"z": _pair(first, sizes, dtype), "params": params}


def _draw_contract(key, sizes, dtype):
    shape = (sizes.channels, sizes.n, sizes.n)
    keys = jax.random.split(key)
    return {name: _normal(k, shape, dtype) for name, k in zip("ab", keys, strict=True)}


def _draw_gated_output(key, sizes, dtype):
    first, second = jax.random.split(key)
    shape = (sizes.channels, sizes.n, sizes.n)
    # As `contract` returns it.
    t = _normal(first, shape, jnp.float32 if dtype == jnp.float16 else dtype)
    pair = _draw_pair(second, sizes, dtype, attention=False, groups=gated_output.GROUPS)
    return {"t": t, **pair}


def _draw_core(key, sizes, dtype):
    keys = jax.random.split(key, 4)
    shape = (sizes.n, sizes.n, sizes.heads, sizes.width)
    qkv = {name: _normal(k, shape, dtype) for name, k in zip("qkv", keys[:3], strict=True)}
    return {**qkv, "bias": _normal(keys[3], (sizes.heads, sizes.n, sizes.n), dtype)}


def _draw_attention_output(key, sizes, dtype):
    first, second = jax.random.split(key)
    groups = attention_stages.OUTPUT_GROUPS
    pair = _draw_pair(second, sizes, dtype, attention=True, groups=groups)
    o = _normal(first, (sizes.n, sizes.n, sizes.heads, sizes.width), dtype)
    return {"o": o, **pair}


def _gated_projection(inputs, mask, implementation):
    return genie_tk_jax.gated_projection(
        inputs["z"], mask, inputs["params"], implementation=implementation
    )


def _contract(inputs, mask, implementation, *, direction):
    del mask
    return genie_tk_jax.contract(inputs["a"], inputs["b"], direction, implementation=implementation)


def _gated_output(inputs, mask, implementation):
    t, z, params = inputs["t"], inputs["z"], inputs["params"]
    return genie_tk_jax.gated_output(t, z, params, mask=mask, implementation=implementation)


def _multiplication(inputs, mask, implementation, *, direction):
    return genie_tk_jax.triangle_multiplication(
        inputs["z"], mask, inputs["params"], direction=direction, implementation=implementation
    )


def _attention(inputs, mask, implementation, *, node):
    return genie_tk_jax.triangle_attention(
        inputs["z"], mask, inputs["params"], node=node, implementation=implementation
    )


def _core(inputs, mask, implementation):
    return genie_tk_jax.pair_attention(**inputs, mask=mask, implementation=implementation)


def _attention_project(inputs, mask, implementation):
    if implementation == "xla":
        return plain.project(inputs["z"], inputs["params"])
    stages = triangle_attention.STAGES["starting", "swapped"]
    results = stages.project(
        (inputs["z"][None], mask[None]),
        inputs["params"],
        node="starting",
        ending_bias="swapped",
        epsilon=EPSILON,
        implementation=implementation,
    )
    return tuple(x[0] for x in results)


def _attention_output(inputs, mask, implementation):
    if implementation == "xla":
        return plain.output(inputs["o"], inputs["z"], inputs["params"])
    stages = triangle_attention.STAGES["starting", "swapped"]
    out = stages.output(
        (inputs["o"][None], inputs["z"][None], mask[None]),
        inputs["params"],
        node="starting",
        residual=False,
        epsilon=EPSILON,
        implementation=implementation,
    )
    return out[0]


def _plain_multiplication(inputs, mask, *, direction):
    return plain.multiplication(inputs["z"], mask, inputs["params"], direction)


def _plain_attention(inputs, mask, *, node):
    return plain.attention(inputs["z"], mask, inputs["params"], node)


def _plain_core(inputs, mask):
    return plain.core(**inputs, mask=mask)


def _layers() -> list[Workload]:
    draw = partial(_draw_pair, attention=False)
    multiplications = [
        Workload(
            "multiplication",
            way,
            draw,
            partial(_multiplication, direction=way),
            partial(_plain_multiplication, direction=way),
        )
        for way in ("outgoing", "incoming")
    ]
    draw = partial(_draw_pair, attention=True)
    attentions = [
        Workload(
            "attention",
            node,
            draw,
            partial(_attention, node=node),
            partial(_plain_attention, node=node),
        )
        for node in ("starting", "ending")
    ]
    return [*multiplications, *attentions]


def _stages() -> list[Workload]:
    first = partial(_draw_pair, attention=False, groups=gated_projection.GROUPS)
    project = partial(_draw_pair, attention=True, groups=attention_stages.PROJECT_GROUPS)
    contractions = [
        Workload("contract", way, _draw_contract, partial(_contract, direction=way), None)
        for way in ("outgoing", "incoming")
    ]
    # The last two are private and have no derivative of their own.
    forward, last = PASSES[:1], _draw_attention_output
    return [
        Workload("attention_core", "", _draw_core, _core, _plain_core),
        Workload("gated_projection", "", first, _gated_projection, None),
        *contractions,
        Workload("gated_output", "", _draw_gated_output, _gated_output, None),
        Workload("attention_project", "", project, _attention_project, None, forward),
        Workload("attention_output", "", last, _attention_output, None, forward),
    ]


WORKLOADS = {workload.name: workload for workload in (*_layers(), *_stages())}
