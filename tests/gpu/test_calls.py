"""How layers are called on the GPU: what serves and what refuses, and every transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw import distance, mask, pair
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from judge import Problem, assert_same_bits, layer, problem, step

import genie_tk_jax
from genie_tk_jax import _ffi

pytestmark = pytest.mark.gpu

N, C_Z = 16, 128
INITIAL = {
    "triangle_multiplication": lambda key, **how: genie_tk_jax.init_triangle_multiplication(
        key, C_Z, 64, init="random", **how
    ),
    "triangle_attention": lambda key, **how: genie_tk_jax.init_triangle_attention(
        key, C_Z, 32, 4, init="random", **how
    ),
}
OPS = {
    "triangle_multiplication": layer(
        "triangle_multiplication", direction="incoming", residual=True
    ),
    "triangle_attention": layer("triangle_attention", node="ending", residual=True),
}
layers = pytest.mark.parametrize("name", OPS)
# Two ways through roundings of bfloat16, a few of them in a row.
CLOSE = 4 * float(jnp.finfo(jnp.bfloat16).eps)


def drawn(name, seed, dtype=jnp.bfloat16, n=N) -> Problem:
    params = INITIAL[name](jax.random.key(seed))
    inputs = {"z": pair(seed, n, C_Z, (), dtype), "params": params}
    return problem(OPS[name], seed, inputs, jnp.asarray(mask(seed, n)))


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# What serves, and what refuses.


@layers
@pytest.mark.parametrize("why", ["float32", "odd width"])
def test_cuda_raises_why_it_cannot_serve_and_none_falls_back(name, why):
    inputs, valid, _ = drawn(name, 1, jnp.float32 if why == "float32" else jnp.bfloat16, n=5)
    if why == "odd width":
        make = getattr(genie_tk_jax, f"init_{name}")
        widths = (24, 20) if name == "triangle_multiplication" else (24, 10, 2)
        inputs = {"z": inputs["z"][..., :24], "params": make(jax.random.key(1), *widths)}
    choices = genie_tk_jax.explain(OPS[name], inputs, valid)
    assert {choice.implementation for choice in choices} == {"xla"}
    with pytest.raises(NotImplementedError) as failure:
        jax.eval_shape(lambda x: OPS[name](x, valid, implementation="cuda"), inputs)
    assert f"{choices[0].op}(implementation='cuda'): {choices[0].reason}" in str(failure.value)


@layers
def test_cuda_is_what_none_takes_where_kernels_serve(name):
    inputs, valid, cotangents = given = drawn(name, 1)
    refused = [
        choice
        for choice in genie_tk_jax.explain(step(OPS[name]), *given)
        if choice.implementation != "cuda"
    ]
    if refused:
        with pytest.raises(NotImplementedError) as failure:
            jax.eval_shape(step(OPS[name], "cuda"), inputs, valid, cotangents)
        assert f"{refused[0].op}(implementation='cuda'): {refused[0].reason}" in str(failure.value)
    else:
        assert_same_bits(step(OPS[name], "cuda")(*given), step(OPS[name])(*given))


def test_every_kernel_is_called(monkeypatch):
    """A kernel that is built and that no layer takes would go untested."""
    called = set()
    call = _ffi.call

    def noted(target, *arguments, **attributes):
        called.add(target)
        return call(target, *arguments, **attributes)

    monkeypatch.setattr(_ffi, "call", noted)
    for name, op in OPS.items():
        genie_tk_jax.explain(step(op), *drawn(name, 1))
    assert called == set(_ffi.TARGETS)


# Transformations.


@layers
@pytest.mark.parametrize("mapped", ["z", "mask", "params"])
def test_vmap_of_the_gradient(name, mapped):
    first, *others = (drawn(name, seed) for seed in range(3))

    def varied(other):
        if mapped == "mask":
            return first._replace(mask=other.mask)
        return first._replace(inputs={**first.inputs, mapped: other.inputs[mapped]})

    problems = [first, *map(varied, others)]
    axes = Problem({"z": None, "params": None}, None, None)
    axes = axes._replace(mask=0) if mapped == "mask" else axes
    axes.inputs.update({mapped: 0} if mapped in axes.inputs else {})
    inputs = {
        key: stacked([x.inputs[key] for x in problems]) if key == mapped else value
        for key, value in first.inputs.items()
    }
    valid = stacked([x.mask for x in problems]) if mapped == "mask" else first.mask
    run = step(OPS[name])
    found = jax.jit(jax.vmap(run, tuple(axes)))(inputs, valid, first.cotangents)
    assert distance(found, stacked([run(*x) for x in problems])) < CLOSE


@layers
def test_gradient_of_vmap_sums_what_is_shared(name):
    problems = [drawn(name, seed) for seed in range(3)]
    params = problems[0].inputs["params"]
    problems = [x._replace(inputs={**x.inputs, "params": params}) for x in problems]

    def every(inputs, valid, implementation=None):
        call = partial(OPS[name], implementation=implementation)
        return jax.vmap(call, ({"z": 0, "params": None}, 0))(inputs, valid)

    z, valid, cotangents = (
        stacked(x) for x in zip(*((x.inputs["z"], *x[1:]) for x in problems), strict=True)
    )
    _, gradients = step(every)({"z": z, "params": params}, valid, cotangents)
    expected = [step(OPS[name])(*x)[1] for x in problems]
    assert distance(gradients["z"], jnp.stack([x["z"] for x in expected])) < CLOSE
    total = jax.tree.map(lambda *leaves: sum(leaves), *(x["params"] for x in expected))
    assert distance(gradients["params"], total) < CLOSE


@layers
def test_remat_and_vmap_of_size_one_in_scan(name):
    """A layer stack as hosts build it."""
    problems = [drawn(name, seed) for seed in range(2)]
    given = problems[0]
    weights = stacked([x.inputs["params"] for x in problems])

    def stack(inputs, valid, implementation=None):
        def block(z, params):
            def one(z):
                return OPS[name]({"z": z, "params": params}, valid, implementation)

            return jax.vmap(one)(z[None])[0], None

        return jax.lax.scan(jax.checkpoint(block), inputs["z"], inputs["params"])[0]

    inputs = {"z": given.inputs["z"], "params": weights}
    found, expected = (
        step(stack, implementation)(inputs, given.mask, given.cotangents)
        for implementation in (None, "xla")
    )
    assert distance(found, expected) < 2 * CLOSE


@layers
def test_rows_over_all_gpus(name):
    """Also over one, where every GPU's shard is the whole."""
    inputs, valid, cotangents = given = drawn(name, 1)
    mesh = Mesh(np.array(jax.devices("gpu")), ("x",))
    rows = NamedSharding(mesh, P("x"))
    z, valid, cotangents = jax.device_put((inputs["z"], valid, cotangents), rows)
    found = step(OPS[name])({**inputs, "z": z}, valid, cotangents)
    assert distance(found, step(OPS[name])(*given)) < CLOSE
    assert found[0].sharding.is_equivalent_to(rows, 3)
    assert found[1]["z"].sharding.is_equivalent_to(rows, 3)
