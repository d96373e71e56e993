"""What a result depends on besides the code: versions and devices."""

import platform
from collections import Counter
from importlib import metadata

import jax

from genie_tk_jax import __version__, _ffi


def environment() -> dict[str, str]:
    """Versions, devices, and whether the kernel library is there or why it is not."""
    devices = Counter(device.device_kind for device in jax.devices())
    return {
        "genie_tk_jax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "kernels": "present" if _ffi.AVAILABLE else f"absent: {_ffi.WHY_ABSENT}",
    }
