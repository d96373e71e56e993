"""Protein design by ColabDesign with our triangle layers: same loss and gradient, and the time.

    pip install 'genie_tk_jax[haiku]' colabdesign
    python examples/colabdesign_swap.py                    # random weights, needs no network
    python examples/colabdesign_swap.py --data-dir DIR --blocks 48 --length 100 --steps 20

DIR holds params/params_model_3_ptm.npz. ColabDesign 1.1.1 needs names that JAX has dropped:
old_jax_names.py, beside this file, gives them back.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import old_jax_names

MODEL = "model_3_ptm"
# What the sequence gradients may differ by, relative to their size.
TOLERANCES = {"bfloat16": 0.3, "float32": 1e-2}


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the two gradients differ by more than rounding."""
    options = arguments().parse_args(argv)
    old_jax_names.provide()
    flags = os.environ.get("XLA_FLAGS", "")
    from colabdesign.af.alphafold.model import modules

    os.environ["XLA_FLAGS"] = flags  # which importing colabdesign overwrites
    import genie_tk_jax.haiku

    host = hallucination(options)
    loss, gradient = step(host, "without the swap")
    # Functions that are traced keep their layers, so the swap comes before the model is built.
    with genie_tk_jax.haiku.swapped(modules):
        ours = hallucination(options)
        our_loss, our_gradient = step(ours, "with the swap")
        for _ in range(options.steps):
            ours.step(verbose=1)
    error = np.linalg.norm(our_gradient - gradient) / np.linalg.norm(gradient)
    print(f"loss {loss:.6f} without, {our_loss:.6f} with; gradients differ by {error:.1e}")
    return int(not error < TOLERANCES[options.dtype])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="with AlphaFold's parameters (default: random ones)")
    parser.add_argument("--length", type=int, default=40, help="residues (default: 40)")
    parser.add_argument("--blocks", type=int, default=2, help="of the Evoformer (default: 2)")
    parser.add_argument("--steps", type=int, default=0, help="of design with the swap (default: 0)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="bfloat16")
    return parser


def hallucination(options: argparse.Namespace):
    """ColabDesign's model, ready to run."""
    from colabdesign import mk_afdesign_model

    model = mk_afdesign_model(
        protocol="hallucination",
        use_bfloat16=options.dtype == "bfloat16",
        data_dir=options.data_dir or ".",
        model_names=[MODEL] if options.data_dir else [],
    )
    settings = model._cfg.model
    settings.embeddings_and_evoformer.evoformer_num_block = options.blocks
    settings.embeddings_and_evoformer.extra_msa_stack_num_block = min(options.blocks, 4)
    model.opt["weights"].update({"plddt": 0.1, "pae": 0.1})
    model.prep_inputs(length=options.length)
    shapes = parameter_shapes(model)
    if model._model_params:
        whole = model._model_params[0]
        own = {scope: whole[scope] for scope in shapes}
        params = jax.tree.map(lambda x, like: x[: like.shape[0]], own, shapes)
    else:
        params = jax.tree_util.tree_map_with_path(random_leaf, shapes)
    model._model_params, model._model_names = [params], [MODEL]
    model.restart(seed=0)
    return model


def parameter_shapes(model):
    """Of the parameters that the model asks for."""
    n = model._len
    previous = {"prev_msa_first_row": (n, 256), "prev_pair": (n, n, 128), "prev_pos": (n, 37, 3)}
    inputs = {name: x for name, x in model._inputs.items() if name not in ("opt", "bias")}
    inputs["prev"] = {name: np.zeros(shape) for name, shape in previous.items()}
    inputs |= {"use_dropout": False, "mask_template_interchain": False, "batch": None}
    return jax.eval_shape(model._model["runner"].init, jax.random.PRNGKey(0), inputs)


def random_leaf(path, like):
    """AlphaFold's initial values make the updates of the triangle layers zero, so not those."""
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(sum(name.encode()))
    values = max(like.shape, default=1) ** -0.5 * rng.standard_normal(like.shape, np.float32)
    return jnp.asarray(values + ("scale" in name), like.dtype)


def step(model, what: str) -> tuple[float, np.ndarray]:
    """Loss and sequence gradient; prints the seconds of the second call, as the first compiles."""
    model.run()
    model.restart(seed=0)
    started = time.perf_counter()
    model.run()
    print(f"{what:<17} {time.perf_counter() - started:8.3f} s")
    return float(model.aux["loss"]), np.asarray(model.aux["grad"]["seq"])


if __name__ == "__main__":
    raise SystemExit(main())
