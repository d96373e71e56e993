"""Parameters of other models' triangle layers, to and from the canonical trees, bit for bit.

`to_canonical` and `from_canonical` convert one layer, also inside a traced function; `load` finds
every triangle layer of a checkpoint and `replace` writes them back. `translate` turns a whole
checkpoint into another layout, as `genie-tk-jax convert` does.
"""

from genie_tk_jax.convert.checkpoint import Found, detect, load, replace, translate
from genie_tk_jax.convert.files import READABLE, WRITABLE, is_array, read, write
from genie_tk_jax.convert.hosts import HOSTS, LAYERS, arguments
from genie_tk_jax.convert.layer import from_canonical, to_canonical
from genie_tk_jax.convert.listing import listing

__all__ = [
    "HOSTS",
    "LAYERS",
    "READABLE",
    "WRITABLE",
    "Found",
    "arguments",
    "detect",
    "from_canonical",
    "is_array",
    "listing",
    "load",
    "read",
    "replace",
    "to_canonical",
    "translate",
    "write",
]
