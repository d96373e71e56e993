"""Checkpoints in files: .npz, .safetensors, and torch's own to read."""

import importlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from genie_tk_jax.convert.layer import as_array, flatten

TORCH = (".pt", ".pth", ".ckpt")
READABLE = (".npz", ".safetensors", *TORCH)
WRITABLE = (".npz", ".safetensors")


def read(path: str | Path) -> dict[str, Any]:
    """The entries of a checkpoint file, as NumPy arrays in the stored dtypes.

    .npz is read without pickle, torch files with the loader that runs no code. A state dict that
    alone holds tensors, as under 'state_dict' or 'model', is returned without its wrapping.

    Raises:
      ValueError: not a kind of file that is known, or it holds what the safe readers refuse.
      ImportError: the package that reads it is not installed; says which.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        reader = _safetensors(path)
        return _or_damaged(path, reader.SafetensorError, partial(reader.numpy.load_file, path))
    if path.suffix in TORCH:
        return _read_torch(path)
    raise ValueError(f"{path}: a checkpoint must be one of {', '.join(READABLE)}.")


def write(path: str | Path, entries: Mapping) -> None:
    """Writes entries, flat or nested, to .npz or .safetensors in their own dtypes.

    Nested keys are joined as haiku's parameter files have them, 'scope//name'.

    Raises:
      ValueError: not a kind of file that can be written.
      TypeError: an entry is not an array.
      ImportError: safetensors is not installed.
    """
    path, arrays = Path(path), {}
    for keys, leaf in flatten(entries).items():
        name = key_of(keys)
        if not is_array(leaf):
            raise TypeError(f"{name} must be an array; got {type(leaf).__name__}. Leave it out.")
        arrays[name] = np.ascontiguousarray(as_array(leaf)).reshape(leaf.shape)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        writer = _safetensors(path)
        try:
            writer.numpy.save_file(arrays, path)
        except writer.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
    else:
        raise ValueError(f"{path}: a checkpoint is written as one of {', '.join(WRITABLE)}.")


def is_array(leaf: Any) -> bool:
    """Whether a checkpoint's entry is an array of numbers; others are settings, step counts."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and str(leaf.dtype) != "object"


def key_of(path: tuple[str, ...]) -> str:
    """The flat key of a nested entry."""
    return path[0] if len(path) == 1 else f"{'/'.join(path[:-1])}//{path[-1]}"


def _or_damaged(path: Path, errors: Any, load: Callable[[], Any]) -> Any:
    """What `load` returns; `errors` are the reader's own way to say that it is no such file."""
    try:
        return load()
    except errors as error:
        raise ValueError(f"{path} is no {path.suffix} file, or damaged: {error}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        # Asked first, for NumPy takes anything else for a pickle.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is no .npz file, or damaged: it is no zip archive.")
    with np.load(path, allow_pickle=False) as entries:
        return {name: _numpy(path, name, entries) for name in entries.files}


def _numpy(path: Path, name: str, entries: Any) -> np.ndarray:
    try:
        array = entries[name]
    except ValueError as error:
        raise ValueError(
            f"{path}: {name} is pickled, and unpickling runs code. Save it as a plain array."
        ) from error
    # NumPy's format has no name for bfloat16, the one number of JAX's that it stores as two bytes.
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def _safetensors(path: Path) -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f"{path} needs safetensors: run  pip install 'genie_tk_jax[convert]'"
        ) from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"{path} needs torch to read: run  pip install torch , or save the state dict as "
            ".safetensors where torch is."
        ) from error
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        tree = _or_damaged(path, (RuntimeError, EOFError, LookupError), load)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which torch's weights-only loader refuses. Where you "
            "trust the file, load it yourself and pass its state dict to genie_tk_jax.convert."
        ) from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds a {type(tree).__name__}; it must hold a state dict.")
    return _numpy_tree(_unwrapped(tree))


def _unwrapped(tree: Mapping) -> Mapping:
    """The innermost mapping that holds all the tensors there are in mappings."""
    inner = [v for v in tree.values() if isinstance(v, Mapping) and _holds_arrays(v)]
    if len(inner) != 1 or any(is_array(v) for v in tree.values()):
        return tree
    return _unwrapped(inner[0])


def _holds_arrays(tree: Mapping) -> bool:
    return any(is_array(leaf) for leaf in flatten(tree).values())


def _numpy_tree(tree: Mapping) -> dict[str, Any]:
    return {
        str(k): _numpy_tree(v) if isinstance(v, Mapping) else as_array(v) for k, v in tree.items()
    }
