"""What a checkpoint holds, as a table of plain text."""

from collections.abc import Mapping

from genie_tk_jax.convert.checkpoint import Found

HEADER = ("layer", "stacked", "c_z", "c_hidden", "dtype", "scope")


def listing(layers: Mapping[str, Found]) -> str:
    """One aligned line for each layer that `load` found.

    'stacked' is the size of a layer stack, '-' without one; c_hidden of an attention layer reads
    'no_heads x channels per head'.
    """
    rows = [HEADER, *(_row(scope, found) for scope, found in layers.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(scope: str, found: Found) -> tuple[str, ...]:
    layer, params = found
    if "attention" in layer:
        *stack, c_z = params["norm"]["scale"].shape
        hidden = " x ".join(str(size) for size in params["q"]["kernel"].shape[-2:])
    else:
        *stack, c_z = params["norm_in"]["scale"].shape
        hidden = str(params["norm_out"]["scale"].shape[-1])
    dtypes = sorted({str(leaf.dtype) for group in params.values() for leaf in group.values()})
    stacked = " x ".join(str(size) for size in stack) or "-"
    return layer, stacked, str(c_z), hidden, ", ".join(dtypes), scope
