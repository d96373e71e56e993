"""The benchmark's figures, drawn without a display: time, speed-up and roofline."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from genie_tk_jax.bench.contestants import LIBRARY, PLAIN, REFERENCE
from genie_tk_jax.bench.costs import PASSES
from genie_tk_jax.bench.peers import PEERS
from genie_tk_jax.bench.report import GROUP, Row, grouped

# One colour and marker a contestant, the same in every figure.
ORDER = (LIBRARY, PLAIN, REFERENCE, *PEERS)
MARKERS = "o^vsDPX*dh"


def draw(rows: Sequence[Row], out: Path) -> Iterator[Path]:
    """Draws every device, dtype and model size of `rows` into `out`; gives the files."""
    timed = [row for row in rows if row["ms"] is not None]
    for group, some in grouped(timed, GROUP).items():
        about = dict(zip(GROUP, group, strict=True))
        title = "{device}, {dtype}, {channels} channels, {heads} heads, {masked:.0%} masked".format(
            **about
        )
        name = "-".join(str(part) for part in group).replace(" ", "_").replace("/", "_")
        for figure, what in ((_time, "time"), (_speed_up, "speed-up"), (_roofline, "roofline")):
            path = out / f"{what}-{name}.png"
            figure(some, title).savefig(path, dpi=130)
            yield path


def _style(contestant: str) -> dict[str, Any]:
    place = ORDER.index(contestant)
    width = 2.4 if contestant == LIBRARY else 1.3
    colour = "#222222" if contestant == LIBRARY else colormaps["tab10"](place - 1)
    return {"color": colour, "marker": MARKERS[place], "lw": width, "zorder": 10 - place}


def _time(rows: Sequence[Row], title: str) -> Figure:
    """Median time against N on logarithmic axes, a panel for each workload and pass."""
    panels = grouped(rows, ("workload", "pass"))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.9 * lines + 0.9), layout="constrained")
    figure.suptitle(f"Time of one call\n{title}")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, ((workload, which), some) in zip(axes, panels.items(), strict=False):
        for (contestant,), own in grouped(some, ("contestant",)).items():
            own = sorted(own, key=lambda row: row["n"])
            sizes, times = [row["n"] for row in own], [row["ms"] for row in own]
            place.plot(sizes, times, label=contestant, ms=5, **_style(contestant))
        place.set_title(f"{workload}, {which}", fontsize=9)
        place.set(xscale="log", yscale="log")
        place.set(xlabel="N", ylabel="median ms")
        place.set_xticks(sorted({row["n"] for row in some}))
        place.xaxis.set_major_formatter(ScalarFormatter())
        place.xaxis.set_minor_formatter(NullFormatter())
        place.grid(which="both", alpha=0.25)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    _legend(figure, rows)
    return figure


def _speed_up(rows: Sequence[Row], title: str) -> Figure:
    """How many times as fast as plain XLA, at the largest N at which that ran."""
    passes = [which for which in PASSES if any(row["pass"] == which for row in rows)]
    figure = Figure(figsize=(11, 3.4 * len(passes) + 1.0), layout="constrained")
    figure.suptitle(f"Speed-up over plain XLA\n{title}")
    places = figure.subplots(len(passes), squeeze=False).ravel()
    for place, which in zip(places, passes, strict=True):
        some = [row for row in rows if row["pass"] == which]
        ratios = _ratios(some)
        for at, found in enumerate(ratios.values()):
            names = [name for name in ORDER if name in found and name != PLAIN]
            width = 0.88 / max(3, len(names))
            for number, name in enumerate(names):
                left = at + (number - (len(names) - 1) / 2) * width
                bar = place.bar(left, found[name], 0.94 * width, color=_style(name)["color"])
                place.bar_label(bar, fmt="%.2g", fontsize=6, padding=1)
        place.axhline(1, color=_style(PLAIN)["color"], lw=1, ls="--")
        labels = [f"{workload}\nN={n}".replace("_", "\n") for workload, n in ratios]
        place.set_xticks(range(len(ratios)), labels, fontsize=7)
        place.set(title=which, ylabel="times as fast")
        place.margins(y=0.12)
        place.spines[["top", "right"]].set_visible(False)
    _legend(figure, rows)
    return figure


def _ratios(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, float]]:
    """Of each workload, at its largest N with plain XLA, every other contestant's speed-up."""
    found = {}
    for (workload,), some in grouped(rows, ("workload",)).items():
        plain = {row["n"]: row["ms"] for row in some if row["contestant"] == PLAIN}
        if plain:
            n = max(plain)
            found[workload, n] = {
                row["contestant"]: plain[n] / row["ms"] for row in some if row["n"] == n
            }
    return found


def _roofline(rows: Sequence[Row], title: str) -> Figure:
    """Counted FLOP/s against counted FLOPs a byte, with the card's two ceilings if known."""
    passes = [which for which in PASSES if any(row["pass"] == which for row in rows)]
    figure = Figure(figsize=(6.4 * len(passes), 5.6), layout="constrained")
    figure.suptitle(f"Roofline at the largest N\n{title}")
    places = figure.subplots(1, len(passes), squeeze=False)[0]
    for place, which in zip(places, passes, strict=True):
        some = [row for row in rows if row["pass"] == which]
        for (kind,), own in grouped(some, ("kind",)).items():
            largest = [row for row in own if row["n"] == max(r["n"] for r in own)]
            top = max(largest, key=_rate)
            for row in largest:
                style = _style(row["contestant"]) | {"lw": 0}
                place.plot(row["flops"] / row["bytes"], _rate(row), ms=6, **style)
            place.annotate(
                f"{kind}, N={top['n']}",
                (top["flops"] / top["bytes"], _rate(top)),
                xytext=(3, 6),
                textcoords="offset points",
                **{"fontsize": 7, "rotation": 35},
            )
        place.set(xscale="log", yscale="log", title=which)
        place.set(xlabel="FLOPs a byte, counted", ylabel="TFLOP/s")
        place.grid(which="both", alpha=0.25)
        place.margins(0.18, 0.2)
        _ceiling(place, rows[0]["ceiling"])
    _legend(figure, rows)
    return figure


def _rate(row: Row) -> float:
    return row["flops"] / row["ms"] / 1e9


def _ceiling(place: Any, ceiling: dict[str, float] | None) -> None:
    if ceiling is None:
        return
    left, right = place.get_xlim()
    place.set_xlim(left, right)
    intensity = np.geomspace(left, right, 200)
    memory = intensity * ceiling["bytes_per_second"]
    place.plot(intensity, np.minimum(memory, ceiling["flops_per_second"]) / 1e12, "k-", lw=1)


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    """One legend for all panels, of the contestants that were timed."""
    present = {row["contestant"] for row in rows}
    lines = []
    for name in (name for name in ORDER if name in present):
        (line,) = figure.axes[0].plot([], [], label=name, **_style(name))
        lines.append(line)
    figure.legend(handles=lines, loc="outside lower center", ncols=5)
