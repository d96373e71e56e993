"""A pair stack fitted to the distances in real structures, on the kernels or on XLA.

    pip install 'genie_tk_jax[train]'
    python examples/train.py fit 1aki.cif 1dix.cif --out ours
    python examples/train.py fit 1aki.cif 1dix.cif --implementation xla --out theirs
    python examples/train.py plot ours/run.json theirs/run.json --out curves.png

Ended early, or called again with more steps, a run goes on where it was saved last.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from distogram import Distogram, Sample, draw, mean_loss, sample
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress

import genie_tk_jax
from genie_tk_jax.bench import machine
from genie_tk_jax.demo import proteins

KINDS = ("cuda", "xla")
# The losses that are averaged where runs are compared.
WINDOW = 50

NUMBERS = (
    ("steps", 300, "in all, those of a run that goes on included"),
    ("crop", 256, "residues of a crop"),
    ("batch", 2, "crops of a step"),
    ("blocks", 4, "depth of the stack"),
    ("seed", 0, "of weights and crops"),
    ("rate", 1e-3, "of learning, once warm"),
    ("warm-up", 50, "steps until the rate is reached"),
    ("save-every", 100, "steps between checkpoints"),
)
# What must stay as it was for a run to go on.
SETTINGS = ("crop", "batch", "blocks", "seed", "rate", "warm_up", "implementation", "dtype")


class State(NamedTuple):
    """All that a step changes."""

    params: nnx.State
    moments: optax.OptState


class Program(NamedTuple):
    """The first state; the compiled step: state, batch -> state, loss; what runs it and why."""

    state: State
    step: jax.stages.Compiled
    choices: Sequence[Any]


def build(options: argparse.Namespace, batch: Sample) -> Program:
    implementation = None if options.implementation == "auto" else options.implementation
    initialise = nnx.jit(partial(Distogram, options.blocks, options.dtype, implementation))
    model, params = nnx.split(initialise(nnx.Rngs(options.seed)))
    rate = optax.linear_schedule(0.0, options.rate, options.warm_up)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    state = State(params, jax.jit(optimizer.init)(params))

    def objective(params, batch):
        return mean_loss(nnx.merge(model, params)(batch), batch)

    def step(state, batch):
        loss, gradients = jax.value_and_grad(objective)(state.params, batch)
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        return State(optax.apply_updates(state.params, updates), moments), loss

    choices = genie_tk_jax.explain(step, state, batch)
    return Program(state, jax.jit(step, donate_argnums=0).lower(state, batch).compile(), choices)


def save(path: Path, state: State, losses: list[float], settings: dict[str, Any]) -> None:
    """Writes a checkpoint that is there whole or not at all."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, losses=losses, settings=json.dumps(settings), **named)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def restore(path: Path, like: State, settings: dict[str, Any]) -> tuple[State, list[float]]:
    """The state and the losses so far.

    Raises:
      InputError: the run was begun with other settings; names them.
    """
    with np.load(path, allow_pickle=False) as stored:
        begun = json.loads(str(stored["settings"]))
        if changed := [name for name in settings if begun.get(name) != settings[name]]:
            told = ", ".join(f"{name} {begun.get(name)}" for name in changed)
            raise proteins.InputError(f"{path}: begun with {told}; ask for that or another --out")

        def leaf(place, like):
            return jnp.array(stored[jax.tree_util.keystr(place)], like.dtype)

        return jax.tree_util.tree_map_with_path(leaf, like), stored["losses"].tolist()


def fit(options: argparse.Namespace) -> None:
    """Trains up to `options.steps`; writes checkpoint.npz and run.json every so often."""
    chains = [proteins.read_structure(path) for path in options.files]
    samples = [sample(chain) for chain in chains]
    settings = {name: getattr(options, name) for name in SETTINGS}
    crops = partial(draw, samples, **{name: settings[name] for name in ("seed", "batch", "crop")})
    settings["chains"] = [f"{chain.name}, {len(chain.residue_types)}" for chain in chains]
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.npz"
    program = build(options, crops(0))
    state, losses, seconds = program.state, [], []
    if checkpoint.exists():
        state, losses = restore(checkpoint, state, settings)
    with Progress() as bar:
        task = bar.add_task("", total=options.steps, completed=len(losses))
        for number in range(len(losses), options.steps):
            batch = crops(number)
            started = time.perf_counter()
            state, loss = program.step(state, batch)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - started)
            bar.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
            if len(losses) % options.save_every == 0 or len(losses) == options.steps:
                save(checkpoint, state, losses, settings)
                median = statistics.median(seconds)
                write(options.out / "run.json", program, settings, losses, median)


def write(path: Path, program: Program, settings: Any, losses: list[float], median: float) -> None:
    ops = {name: [c.op for c in program.choices if c.implementation == name] for name in KINDS}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device(),
        "versions": machine.versions(["flax", "optax"]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": settings,
        "ops": ops,
        "step_milliseconds": 1e3 * median,
        "temporaries_bytes": program.step.memory_analysis().temp_size_in_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "losses": losses,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def plot(options: argparse.Namespace) -> None:
    """Draws the loss of every run and its distance from the first's; prints what they cost."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.runs]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for run in runs:
        settings, losses = run["settings"], np.array(run["losses"])
        kind = "kernels" if run["ops"]["cuda"] else "XLA"
        label = f"{kind}, {settings['dtype']}, seed {settings['seed']} {run['xla_flags']}".strip()
        both = min(len(losses), len(runs[0]["losses"]))
        away = losses[:both] - runs[0]["losses"][:both]
        (line,) = above.plot(*smooth(losses), label=label)
        if settings["seed"] == runs[0]["settings"]["seed"]:
            below.plot(*smooth(away), color=line.get_color())
        print(f"{label}: last {WINDOW} losses {losses[-WINDOW:].mean():.4f}", end="")
        print(f", from the first run {np.sqrt(np.mean(away[-WINDOW:] ** 2)):.4f} (rms)", end="")
        print(f"; {run['step_milliseconds']:.1f} ms a step", end="")
        print(f", {run['temporaries_bytes'] / 2**20:.0f} MiB of temporaries")
    above.set(ylabel="loss (nats)", title=f"Mean of {WINDOW} steps; {runs[0]['device']['name']}")
    above.legend()
    below.set(xlabel="step", ylabel="distance from the first")
    figure.savefig(options.out, dpi=120)


def smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the last WINDOW losses (fewer in a shorter run)."""
    width = min(WINDOW, len(losses))
    means = np.convolve(losses, np.full(width, 1 / width), "valid")
    return np.arange(width, len(losses) + 1), means


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    training = commands.add_parser("fit", help="train, or go on training")
    training.set_defaults(command=fit)
    training.add_argument("files", nargs="+", type=Path, help="PDB or mmCIF, a chain of each")
    training.add_argument("--out", type=Path, required=True, help="a folder for what is written")
    training.add_argument("--implementation", choices=("auto", *KINDS), default="auto")
    training.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, default, what in NUMBERS:
        told = f"{what} (default: {default})"
        training.add_argument(f"--{name}", type=type(default), default=default, help=told)
    drawing = commands.add_parser("plot", help="draw the losses of runs")
    drawing.set_defaults(command=plot)
    drawing.add_argument("runs", nargs="+", type=Path, help="run.json of each")
    drawing.add_argument("--out", type=Path, required=True, help="the image to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        options.command(options)
    except (proteins.InputError, NotImplementedError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
