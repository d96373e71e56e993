"""Attention needs O(N^2) memory by XLA's analysis of the compiled function; nothing runs."""

import jax
import jax.numpy as jnp
import pytest

import genie_tk_jax


def temporaries(n, node, implementation):
    """Bytes of forward and gradient of one layer of 4 heads of 32, in bfloat16."""
    key = jax.random.key(0)
    weights = genie_tk_jax.init_triangle_attention(key, 128, 32, 4)
    z = jax.ShapeDtypeStruct((n, n, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((n, n), bool)

    def total(z, weights, mask):
        out = genie_tk_jax.triangle_attention(
            z, mask, weights, node=node, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    return step.lower(z, weights, mask).compile().memory_analysis().temp_size_in_bytes


# XLA's CPU compiler before jax 0.12 knows no 16-bit slices: loops over rows read copies of whole
# arrays in float32, and it makes those, and the loops' results, all at the start.
LIMIT = 3e9 if jax.__version_info__ >= (0, 12) else 6e9


@pytest.mark.parametrize("implementation", [None, "xla"], ids=["staged", "xla"])
@pytest.mark.parametrize("node", ["starting", "ending"])
def test_one_layer_forward_and_gradient(node, implementation):
    assert temporaries(1024, node, implementation) < LIMIT


def test_grows_with_the_square_of_n():
    """Four times the pairs take about four times the memory; cubic growth would be eight."""
    assert temporaries(2048, "starting", None) < 5 * temporaries(1024, "starting", None)
