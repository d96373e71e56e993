"""Drop-in layers for models written in haiku, and the swap that puts them there.

    import genie_tk_jax.haiku
    from alphafold.model import modules

    genie_tk_jax.haiku.swap(modules)          # or: with genie_tk_jax.haiku.swapped(modules): ...

The host's own parameters are used in place: no checkpoint is converted.
"""

from genie_tk_jax.haiku.swap import swap, swapped, unswap

__all__ = ["swap", "swapped", "unswap"]
