"""`explain`: what runs and why, through whatever wraps the call."""

import jax
import jax.numpy as jnp
from draw import pair, params

import genie_tk_jax

Z = pair(1, 5, 16)
WEIGHTS = params("triangle_multiplication", 3, 16)


def layer(z, weights, implementation=None):
    return genie_tk_jax.triangle_multiplication(
        z, None, weights, direction="outgoing", implementation=implementation
    )


def ops(choices):
    return [choice.op for choice in choices]


FORWARD = ["gated_projection", "contract", "gated_output"]
BACKWARD = ["gated_output_backward", "contract_backward", "gated_projection_backward"]


def test_names_each_stage_with_its_reason_and_operands():
    choices = genie_tk_jax.explain(layer, Z, WEIGHTS)
    assert ops(choices) == FORWARD
    for choice in choices:
        assert choice.implementation in ("cuda", "xla")
        assert choice.reason
    assert "float32[1, 5, 5, 16]" in choices[0].operands
    assert str(choices[1]).startswith("contract: ")


def test_sees_through_a_jit_that_is_already_traced():
    call = jax.jit(layer)
    call(Z, WEIGHTS)
    assert ops(genie_tk_jax.explain(call, Z, WEIGHTS)) == FORWARD
    assert ops(genie_tk_jax.explain(call, Z, WEIGHTS)) == FORWARD


def test_includes_the_backward():
    gradient = jax.jit(jax.grad(lambda z, w: jnp.sum(layer(z, w))))
    assert ops(genie_tk_jax.explain(gradient, Z, WEIGHTS)) == FORWARD + BACKWARD


def test_a_scanned_stack_is_one_row_an_op():
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), WEIGHTS)

    def stack(z, stacked):
        return jax.lax.scan(lambda z, w: (z + layer(z, w), None), z, stacked)[0]

    assert ops(genie_tk_jax.explain(stack, Z, stacked)) == FORWARD


def test_says_that_xla_was_asked_for():
    (choice,) = genie_tk_jax.explain(layer, Z, WEIGHTS, implementation="xla")
    assert (choice.op, choice.implementation) == ("triangle_multiplication", "xla")
    assert "asked for" in choice.reason


def test_takes_shapes_and_runs_nothing():
    shape = jax.ShapeDtypeStruct((4096, 4096, 16), jnp.bfloat16)
    choices = genie_tk_jax.explain(layer, shape, WEIGHTS)
    assert "bfloat16[1, 4096, 4096, 16]" in choices[0].operands


def test_attention_has_its_stages():
    weights = params("triangle_attention", 3, 16)

    def scalar(z):
        return jnp.sum(genie_tk_jax.triangle_attention(z, None, weights, node="ending"))

    assert ops(genie_tk_jax.explain(jax.grad(scalar), Z)) == [
        "attention_project",
        "attend",
        "attention_output",
        "attention_rows_backward",
        "attention_bias_backward",
    ]
