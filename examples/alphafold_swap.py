"""AlphaFold's own trunk with its triangle layers and with ours: same results, and the time of each.

    pip install 'genie_tk_jax[haiku]' alphafold-colabfold colabfold-kernels
    python examples/alphafold_swap.py                      # random weights, needs no network
    python examples/alphafold_swap.py --params params_model_3_ptm.npz --blocks 48 --length 384

DeepMind's AlphaFold works as well: it has the same modules under the same names.
"""

import argparse
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from alphafold.model import config as host_config
from alphafold.model import modules, utils

import genie_tk_jax.haiku
from genie_tk_jax import explain

# What two ways to round may differ by, of outputs of random weights.
TOLERANCES = {"bfloat16": 0.2, "float32": 1e-3}
KEY = jax.random.PRNGKey(0)
# A model without templates; its parameters lie in params_model_3_ptm.npz.
MODEL, PREFIX = "model_3_ptm", "alphafold/alphafold_iteration/"


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the two differ by more than rounding."""
    options = arguments().parse_args(argv)
    batch = features(np.random.default_rng(0), options.length)
    params = parameters(options, batch)

    def run():
        function = jax.jit(trunk(options).apply)
        out, seconds = timed(function, params, KEY, batch)
        return function, out, seconds

    _, host, host_seconds = run()
    # The three lines: the host's own layers come back after the block.
    with genie_tk_jax.haiku.swapped(modules):
        function, ours, our_seconds = run()
        choices = explain(function, params, KEY, batch)

    kernels = sum(choice.implementation == "cuda" for choice in choices)
    print(f"{options.length} residues, {options.blocks} blocks, {options.dtype}")
    print(f"without the swap {host_seconds:8.3f} s\nwith the swap    {our_seconds:8.3f} s")
    print(f"{kernels} of {len(choices)} kinds of calls take a kernel; the first is\n  {choices[0]}")
    errors = {name: difference(ours[name], host[name]) for name in ("single", "pair")}
    print("difference:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return int(not max(errors.values()) < TOLERANCES[options.dtype])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--params", help="an .npz of AlphaFold's parameters (default: random ones)")
    parser.add_argument("--length", type=int, default=64, help="residues (default: 64)")
    parser.add_argument("--blocks", type=int, default=2, help="of the Evoformer (default: 2)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="bfloat16")
    return parser


def trunk(options: argparse.Namespace):
    """haiku's init and apply of the host's trunk: embeddings, extra MSA stack, Evoformer."""
    model = host_config.model_config(MODEL).model
    settings, shared = model.embeddings_and_evoformer, model.global_config
    settings.evoformer_num_block = options.blocks
    settings.extra_msa_stack_num_block = min(options.blocks, 4)
    shared.bfloat16, shared.deterministic = options.dtype == "bfloat16", True

    def call(batch):
        return modules.EmbeddingsAndEvoformer(settings, shared)(batch, is_training=False)

    return hk.transform(call)


def features(rng: np.random.Generator, n: int) -> dict[str, jax.Array]:
    """What the trunk reads, of a random sequence that is its own alignment."""
    aatype = rng.integers(0, 20, n)
    one_hot = np.eye(23)[aatype]
    seen = {
        "aatype": aatype,
        "residue_index": np.arange(n),
        "target_feat": np.eye(22)[aatype + 1],
        "msa_feat": np.concatenate([one_hot, np.zeros((n, 2)), one_hot, np.zeros((n, 1))], 1)[None],
        "seq_mask": np.ones(n),
        "msa_mask": np.ones((1, n)),
        "extra_msa": aatype[None],
        "extra_msa_mask": np.ones((1, n)),
        **{name: np.zeros((1, n)) for name in ("extra_has_deletion", "extra_deletion_value")},
        "prev_pos": np.zeros((n, 37, 3)),
        "prev_msa_first_row": np.zeros((n, 256)),
        "prev_pair": np.zeros((n, n, 128)),
    }
    kinds = {name: np.int32 if x.dtype.kind == "i" else np.float32 for name, x in seen.items()}
    return {name: jnp.asarray(x, kinds[name]) for name, x in seen.items()}


def parameters(options: argparse.Namespace, batch: dict[str, jax.Array]):
    """Those of the file, of as many blocks as are asked for, or random ones."""
    shapes = jax.eval_shape(trunk(options).init, KEY, batch)
    if options.params is None:
        return jax.tree_util.tree_map_with_path(random_leaf, shapes)
    with np.load(options.params, allow_pickle=False) as stored:
        whole = utils.flat_params_to_haiku(dict(stored))
    own = {scope: whole[PREFIX + scope] for scope in shapes}
    return jax.tree.map(lambda x, like: x[: like.shape[0]], own, shapes)


def random_leaf(path, like):
    """AlphaFold's initial values make the updates of the triangle layers zero, so not those."""
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(sum(name.encode()))
    values = max(like.shape, default=1) ** -0.5 * rng.standard_normal(like.shape, np.float32)
    return jnp.asarray(values + ("scale" in name), like.dtype)


def timed(function, *arguments):
    """The results and the seconds of the second call; the first compiles."""
    jax.block_until_ready(function(*arguments))
    started = time.perf_counter()
    out = jax.block_until_ready(function(*arguments))
    return out, time.perf_counter() - started


def difference(found, expected) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    raise SystemExit(main())
