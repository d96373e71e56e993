"""Eight simulated CPU devices for every test, and the switch for tests that need a GPU."""

import os
import shutil

# XLA reads its flags when a backend starts, so before the first test imports JAX. Programs here
# run for milliseconds and compile for seconds: without a GPU they are compiled unoptimised, with
# one XLA tries no variants of its own products.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if shutil.which("nvidia-smi") is None:
    FLAGS.append("--xla_backend_optimization_level=0")
else:
    FLAGS.append("--xla_gpu_autotune_level=0")
# Several processes, or a harness beside them, share the memory of one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; JAX sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def float64():
    """Arrays of 64 bits for one test, which float32 would not tell from rounding."""
    with jax.enable_x64(True):
        yield jnp.float64
