"""The demo's two figures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def pair_before_after(
    path: Path, title: str, before: np.ndarray, after: np.ndarray, distance: np.ndarray | None
) -> None:
    """Maps of a float32 pair representation [N, N, C] before and after the stack.

    A map shows the root of the mean square over the channels, in a colour scale of its own, as
    the stack makes values larger. distance is the C-beta distance in angstrom, [N, N], and NaN,
    drawn grey, where it is unknown.
    """
    maps = [(_rms(before), "Before the stack", "RMS over channels", "viridis")]
    maps.append((_rms(after), "After the stack", "RMS over channels", "viridis"))
    if distance is not None:
        maps.insert(0, (distance, "Structure", "C-beta distance (Å)", "magma_r"))
    figure = Figure(figsize=(5.2 * len(maps), 4.8), layout="constrained")
    figure.suptitle(title)
    size = len(before)
    for axes, (values, name, unit, colours) in zip(
        figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True
    ):
        axes.set_facecolor("lightgrey")
        edges = (0.5, size + 0.5)
        image = axes.imshow(values, cmap=colours, origin="upper", extent=(*edges, *edges[::-1]))
        axes.set(title=name, xlabel="residue j", ylabel="residue i")
        figure.colorbar(image, ax=axes, label=unit, shrink=0.85)
    figure.savefig(path, dpi=150)


def time_per_layer(path: Path, title: str, rows: Sequence[Mapping[str, Any]], dtype: str) -> None:
    """Median time of every layer beside its float32 XLA reference, as horizontal bars.

    rows: the fields of measure.Choice and measure.Measurement, by name.
    """
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    bars = [
        (-0.2, [row["milliseconds"] for row in rows], f"this run, {dtype}", "tab:blue"),
        (0.2, [row["reference_milliseconds"] for row in rows], "XLA, float32", "silver"),
    ]
    for shift, times, label, colour in bars:
        drawn = axes.barh(places + shift, times, 0.38, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=9)
    axes.set_yticks(places, [f"{row['layer']}\n({row['implementation']})" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel="median time per call (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _rms(z: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(z), axis=-1))
