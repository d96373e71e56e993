"""Whole checkpoints, in files and in memory, and the command that converts them."""

import importlib.util

import host_layers
import jax.numpy as jnp
import numpy as np
import pytest
from host_layers import KINDS, LAYERS
from test_convert import assert_same_trees

from genie_tk_jax import cli, convert
from genie_tk_jax.convert.layer import flatten

EVOFORMER = "alphafold/alphafold_iteration/evoformer/"
NAMES = {
    "alphafold2": tuple(LAYERS.values()),
    "alphafold2_fused": tuple(LAYERS.values()),
    "alphafold3": (*list(LAYERS.values())[:2], "pair_attention1", "pair_attention2"),
    "openfold": ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end"),
    "openfold_fused": ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end"),
    "boltz": ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end"),
}
# A host's own prefixes, with the layer stack there: haiku stacks leaves, torch numbers modules.
PREFIXES = {
    "alphafold2": {
        EVOFORMER + "evoformer_iteration/": (3,),
        EVOFORMER + "template_embedding/single_template_embedding/template_pair_stack/"
        "__layer_stack_no_state/": (2,),
    },
    "alphafold2_fused": {EVOFORMER + "extra_msa_stack/": (4,)},
    "alphafold3": {
        "diffuser/evoformer/__layer_stack_no_per_layer_1/trunk_pairformer/": (3,),
        "diffuser/confidence_head/__layer_stack_no_per_layer/confidence_pairformer/": (2,),
    },
    "openfold": {"evoformer.blocks.0.pair_stack.": (), "evoformer.blocks.1.core.": ()},
    "openfold_fused": {"evoformer.blocks.0.pair_stack.": ()},
    "boltz": {"pairformer_module.layers.0.": (), "msa_module.layers.0.pairformer_layer.": ()},
}


def checkpoint(host, dtype=np.float32):
    """A flat checkpoint with a host's own keys, and entries that are no triangle layer's."""
    torch = NAMES[host][0] == "tri_mul_out"
    entries = {"other.weight" if torch else "other/linear//weights": np.ones((2, 2), dtype)}
    for prefix, stack in PREFIXES[host].items():
        for kind, name in zip(KINDS, NAMES[host], strict=True):
            for leaf, value in host_layers.leaves(host, kind, len(entries), stack, dtype).items():
                module, _, own = f"{prefix}{name}/{leaf}".rpartition("/")
                key = f"{prefix}{name}.{leaf}" if torch else f"{module}//{own}"
                entries[key] = value
    return entries


def nested(entries):
    """haiku's {scope: {name: array}}."""
    tree = {}
    for key, value in entries.items():
        scope, _, name = key.partition("//")
        tree.setdefault(scope, {})[name] = value
    return tree


hosts = pytest.mark.parametrize("host", NAMES)


@hosts
def test_load_finds_every_layer(host):
    entries = checkpoint(host)
    assert convert.detect(entries) == host
    layers = convert.load(entries)
    assert list(layers) == [prefix + name for prefix in PREFIXES[host] for name in NAMES[host]]
    for (scope, found), kind in zip(layers.items(), KINDS * 2, strict=False):
        assert found.layer == LAYERS[kind]
        own = {k: v for k, v in entries.items() if k.startswith(scope)}
        leaves = {k[len(scope) :].strip("/.").replace("//", "/"): v for k, v in own.items()}
        assert_same_trees(found.params, convert.to_canonical(leaves, host, found.layer))


@hosts
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_replace_undoes_load_and_touches_nothing_else(host, form):
    entries = checkpoint(host, jnp.bfloat16)
    entries = nested(entries) if form == "nested" and "//" in list(entries)[0] else entries
    entries["step"] = 7
    layers = convert.load(entries)
    assert_same_trees(convert.replace(entries, layers), entries)
    scope, found = list(layers.items())[1]
    found.params["norm_in"]["scale"] = -found.params["norm_in"]["scale"]
    after = convert.replace(entries, {scope: found})
    assert_same_trees(convert.load(after)[scope].params, found.params)
    same = [path for path, leaf in flatten(entries).items() if leaf is flatten(after)[path]]
    assert {"/".join(path).startswith(scope) for path in same} == {False}
    assert len(flatten(entries)) - len(same) == len(host_layers.leaves(host, "incoming"))


def test_replace_refuses_other_scopes_and_shapes():
    entries = checkpoint("openfold")
    layers = convert.load(entries)
    scope, found = next(iter(layers.items()))
    with pytest.raises(ValueError, match="no triangle_multiplication_outgoing at 'x'"):
        convert.replace(entries, {"x": found})
    stacked = {g: {n: np.stack([x, x]) for n, x in v.items()} for g, v in found.params.items()}
    with pytest.raises(ValueError, match="has shape .*; in the checkpoint it has"):
        convert.replace(entries, {scope: convert.Found(found.layer, stacked)})


@hosts
def test_canonical_files_give_back_the_host(host, tmp_path):
    entries = checkpoint(host, jnp.bfloat16)
    for suffix in ("npz", "safetensors"):
        convert.write(tmp_path / f"host.{suffix}", entries)
        assert_same_trees(convert.read(tmp_path / f"host.{suffix}"), entries)
        canonical = convert.translate(tmp_path / f"host.{suffix}")
        convert.write(tmp_path / f"canonical.{suffix}", canonical)
        assert convert.detect(tmp_path / f"canonical.{suffix}") == "canonical"
        again = convert.translate(tmp_path / f"canonical.{suffix}", to=host)
        assert_same_trees(again, {k: v for k, v in entries.items() if not k.startswith("other")})


def test_translate_keeps_other_entries_and_maths():
    entries = checkpoint("alphafold2")
    fused = convert.translate(entries, to="alphafold2_fused")
    assert fused["other/linear//weights"] is entries["other/linear//weights"]
    assert convert.detect(fused) == "alphafold2_fused"
    assert_same_trees(
        {scope: found.params for scope, found in convert.load(fused).items()},
        {scope: found.params for scope, found in convert.load(entries).items()},
    )
    assert_same_trees(convert.translate(fused, to="alphafold2"), entries)
    with pytest.raises(ValueError, match="otherwise than alphafold3"):
        convert.translate(checkpoint("alphafold3"), to="boltz")


def test_what_is_no_checkpoint_of_a_known_host():
    with pytest.raises(ValueError) as refusal:
        convert.load({"encoder/linear//w": np.ones(3), "b": np.ones(3)})
    for word in ("among 2 entries, such as encoder/linear//w, b", "tri_mul_out.p_in.weight"):
        assert word in str(refusal.value)
    entries = checkpoint("openfold")
    del entries["evoformer.blocks.0.pair_stack.tri_mul_in.linear_a_g.bias"]
    with pytest.raises(ValueError) as refusal:
        convert.load(entries)
    assert "pair_stack.tri_mul_in: linear_a_g.bias missing" in str(refusal.value)
    with pytest.raises(ValueError, match="no triangle layer found"):
        convert.load(entries, "alphafold2")
    with pytest.raises(ValueError, match="pair_stack.tri_mul_in: .*linear_a_g.bias missing"):
        convert.load(entries, "openfold")


def test_files_that_cannot_be_read(tmp_path):
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="a is pickled"):
        convert.read(tmp_path / "pickled.npz")
    for suffix in ("npz", "safetensors"):
        (tmp_path / f"x.{suffix}").write_bytes(b"no checkpoint" * 9)
        with pytest.raises(ValueError, match=f"is no .{suffix} file, or damaged"):
            convert.read(tmp_path / f"x.{suffix}")
    with pytest.raises(ValueError, match="must be one of .npz, .safetensors, .pt"):
        convert.read(tmp_path / "x.h5")
    with pytest.raises(TypeError, match="step must be an array; got int"):
        convert.write(tmp_path / "x.npz", {"step": 1})
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ImportError, match="needs torch to read"):
            convert.read(tmp_path / "x.pt")


@pytest.mark.parametrize("wrapping", [(), ("state_dict",), ("ema", "params")])
def test_torch_files(wrapping, tmp_path):
    torch = pytest.importorskip("torch", reason="reads .pt files through torch, which is not here")
    entries = checkpoint("boltz")
    state = {key: torch.from_numpy(value).bfloat16() for key, value in entries.items()}
    tree = state
    for key in reversed(wrapping):
        tree = {key: tree, "epoch": 3}
    torch.save(tree, tmp_path / "x.ckpt")
    expected = {key: value.astype(jnp.bfloat16) for key, value in entries.items()}
    assert_same_trees(convert.read(tmp_path / "x.ckpt"), expected)
    from_file, from_memory = (
        {scope: found.params for scope, found in convert.load(source).items()}
        for source in (tmp_path / "x.ckpt", state)
    )
    assert_same_trees(from_file, from_memory)
    torch.save({"model": state, "setting": object()}, tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match="weights-only loader refuses"):
        convert.read(tmp_path / "unsafe.pt")


def test_the_command_lists_and_converts(tmp_path, capsys):
    source, canonical = tmp_path / "params.npz", tmp_path / "canonical.safetensors"
    convert.write(source, checkpoint("alphafold2"))
    assert cli.main(["convert", str(source), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source}: alphafold2"
    assert lines[1].split() == ["layer", "stacked", "c_z", "c_hidden", "dtype", "scope"]
    scope = EVOFORMER + "evoformer_iteration/triangle_attention_ending_node"
    row = next(line.split() for line in lines if line.endswith(scope))
    assert row[:-1] == ["triangle_attention_ending_node", "3", "8", "3", "x", "4", "float32"]
    assert len(lines) == 2 + 8
    assert list(tmp_path.iterdir()) == [source]

    assert cli.main(["convert", str(source), str(canonical)]) == 0
    assert "wrote" in capsys.readouterr().out
    back = tmp_path / "back.npz"
    assert cli.main(["convert", str(canonical), str(back), "--to", "alphafold2"]) == 0
    expected = convert.read(source)
    del expected["other/linear//weights"]
    assert_same_trees(convert.read(back), expected)


def test_the_command_says_how_alphafold3_calls_its_ending_node(tmp_path, capsys):
    convert.write(tmp_path / "x.npz", checkpoint("alphafold3"))
    assert cli.main(["convert", str(tmp_path / "x.npz"), "--list"]) == 0
    assert "ending_bias='unswapped'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.npz", "--list"], "No such file"),
        (["x.npz", "--from", "openfold", "--list"], "no triangle layer found"),
        (["x.npz"], "convert needs DST"),
        (["x.npz", "y.pt"], "written as one of .npz, .safetensors"),
    ],
)
def test_the_commands_errors(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.write("x.npz", checkpoint("alphafold3"))
    assert cli.main(["convert", *arguments]) == 2
    assert words in capsys.readouterr().err
