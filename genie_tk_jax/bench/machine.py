"""What figures depend on besides the code: the device, its driver, and versions."""

import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax

from genie_tk_jax.demo.environment import environment


def device() -> dict[str, Any]:
    """The device that JAX runs on by default, and its driver where it has one."""
    first = jax.devices()[0]
    driver = _driver() if first.platform == "gpu" else None
    return {"name": first.device_kind, "count": len(jax.devices()), "driver": driver}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of this library and what it runs on, and of those of `packages` that are installed."""
    own = environment()
    found = {name: own[name] for name in ("genie_tk_jax", "python", "jax", "jaxlib")}
    for package in sorted(packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def kernels() -> str:
    """Whether our kernel library is present, or why not."""
    return environment()["kernels"]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() or None
