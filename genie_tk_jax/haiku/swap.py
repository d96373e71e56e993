"""Puts the drop-ins into a host's modules object, and takes them out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genie_tk_jax import _contract
from genie_tk_jax._dispatch import Implementation
from genie_tk_jax.haiku import alphafold2, alphafold3

# What tells a host: the classes that its modules object must have. AlphaFold 3's comes first,
# since its names are the rarer ones.
HOSTS = {
    "AlphaFold 3": (
        {
            "TriangleMultiplication": alphafold3.TriangleMultiplication,
            "GridSelfAttention": alphafold3.GridSelfAttention,
        },
        ("PairFormerIteration",),
    ),
    "AlphaFold 2": (
        {
            "TriangleMultiplication": alphafold2.TriangleMultiplication,
            "TriangleAttention": alphafold2.TriangleAttention,
        },
        ("EvoformerIteration",),
    ),
}


def _replacements(modules: Any) -> dict[str, type]:
    for classes, users in HOSTS.values():
        if all(hasattr(modules, name) for name in (*classes, *users)):
            return classes
    known = "; ".join(
        f"{host} ({', '.join((*classes, *users))})" for host, (classes, users) in HOSTS.items()
    )
    found = sorted(name for name in dir(modules) if "Triangle" in name or "Attention" in name)
    raise ValueError(
        f"swap: modules must be the modules object of a known host: {known}. "
        f"{getattr(modules, '__name__', modules)!r} has {', '.join(found) or 'none of these'}. "
        "Pass for instance alphafold.model.modules, or call the layers of genie_tk_jax yourself."
    )


def swap(modules: Any, *, implementation: Implementation | None = None) -> None:
    """Replaces the triangle layers of a host, until `unswap`.

    Models that are built afterwards use ours, in every stack: monomer, multimer, templates, extra
    MSA, trunk, confidence. Functions already traced by jit keep what they were traced with.

    Args:
      modules: `alphafold.model.modules` (DeepMind's or ColabFold's),
        `colabdesign.af.alphafold.model.modules` or `alphafold3.model.network.modules`.
      implementation: "cuda", "xla", or None for kernels wherever they serve.

    Raises:
      ValueError: `modules` is of no known host; says what was found and what is known.
    """
    _contract.one_of("swap", "implementation", implementation, _contract.IMPLEMENTATIONS)
    for name, ours in _replacements(modules).items():
        replaced = getattr(modules, name)
        replaced = getattr(replaced, "replaces", replaced)
        settings = {"implementation": implementation, "replaces": replaced}
        if hasattr(replaced, "Config"):
            settings["Config"] = replaced.Config
        setattr(modules, name, type(name, (ours,), settings))


def unswap(modules: Any) -> None:
    """Gives a host its own triangle layers back; nothing happens where none was replaced."""
    for name in _replacements(modules):
        current = getattr(modules, name)
        setattr(modules, name, getattr(current, "replaces", current))


@contextmanager
def swapped(modules: Any, *, implementation: Implementation | None = None) -> Iterator[None]:
    """`swap` for the length of a `with` block; what was there before comes back."""
    before = {name: getattr(modules, name) for name in _replacements(modules)}
    swap(modules, implementation=implementation)
    try:
        yield
    finally:
        for name, host in before.items():
            setattr(modules, name, host)
