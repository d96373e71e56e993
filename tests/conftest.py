"""Eight simulated CPU devices for every test, and the switch for tests that need a GPU."""

import os

# Read when JAX starts its CPU backend, so it must be set before the first test imports it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


def pytest_collection_modifyitems(items):
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if gpus:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; JAX sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
