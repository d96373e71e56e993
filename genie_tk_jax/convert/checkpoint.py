"""Every triangle layer of a whole checkpoint: finding them, taking them out, putting them back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from genie_tk_jax.convert import files, hosts
from genie_tk_jax.convert.hosts import HOSTS, LAYERS
from genie_tk_jax.convert.layer import flatten, from_canonical, misfit, own_leaf, to_canonical

Source = str | Path | Mapping


class Found(NamedTuple):
    """A layer of a checkpoint: which of LAYERS it is, and its canonical parameters."""

    layer: str
    params: dict[str, dict[str, Any]]


class _Scope(NamedTuple):
    layer: str
    parent: str
    paths: dict[str, tuple[str, ...]]


def detect(source: Source) -> str:
    """The host whose names the triangle layers of a checkpoint bear, one of HOSTS.

    ESMFold and Genie hold OpenFold's classes and answer to 'openfold'.

    Raises:
      ValueError: no host fits; says what was found and what is known.
    """
    return _detect(flatten(_mapping(source)))


def load(source: Source, host: str | None = None) -> dict[str, Found]:
    """All triangle layers of a checkpoint, as canonical trees.

    Args:
      source: a file (.npz, .safetensors, .pt, .pth, .ckpt), or the mapping it holds: haiku's nested
        one, flat 'scope//name' keys, or a torch state dict, wrapped or not. Other entries may be
        there. Leaves of a layer stack keep their leading axes.
      host: one of HOSTS, or None to find out.

    Returns:
      {scope: Found(layer, params)} in the checkpoint's order.

    Raises:
      ValueError, TypeError: nothing was found, or a layer does not fit; says which.
      OSError, ImportError: the file cannot be read; says why.
    """
    flat = flatten(_mapping(source))
    host = host or _detect(flat)
    found = {}
    for scope, (layer, _, paths) in _known_scopes(flat, host).items():
        leaves = {leaf: flat[path] for leaf, path in paths.items()}
        try:
            found[scope] = Found(layer, to_canonical(leaves, host, layer))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{scope}: {error}") from None
    return found


def replace(source: Source, layers: Mapping[str, Found], host: str | None = None) -> dict[str, Any]:
    """A copy of a checkpoint in which the leaves of `layers` are replaced: undoes `load`.

    Args:
      source: as for `load`; itself it stays as it is.
      layers: {scope: (layer, canonical params)} for some or all scopes that `load` finds.
      host: one of HOSTS, or None to find out.

    Returns:
      The mapping, nested as it was. All other entries are the same objects.

    Raises:
      ValueError: a scope is not in the checkpoint, or a leaf has another shape there.
    """
    tree = _mapping(source)
    flat = flatten(tree)
    host = host or _detect(flat)
    scopes = _known_scopes(flat, host)
    result = _copied(tree)
    for scope, (layer, params) in layers.items():
        if scope not in scopes or scopes[scope].layer != layer:
            raise ValueError(f"no {layer} at {scope!r}; the checkpoint has {', '.join(scopes)}.")
        for leaf, value in from_canonical(params, host, layer).items():
            path = scopes[scope].paths.get(leaf)
            old = None if path is None else tuple(flat[path].shape)
            if path is None or old != tuple(value.shape):
                raise ValueError(
                    f"{scope}: {leaf} has shape {tuple(value.shape)}; in the checkpoint it "
                    f"{'is absent' if old is None else f'has {old}'}. Pass the trees that load "
                    "gave, with new values only."
                )
            _put(result, path, value)
    return result


def translate(source: Source, host: str | None = None, to: str = "canonical") -> dict[str, Any]:
    """A checkpoint with its triangle layers in another layout, flat, ready for `write`.

    Scopes keep their prefix and take the name that `to` has for the layer. Towards 'canonical' the
    other entries are left out; otherwise they stay.

    Args:
      source: as for `load`.
      host: one of HOSTS, or None to find out.
      to: one of HOSTS.

    Raises:
      ValueError: as for `load`; or `to` computes a layer otherwise than `host`, or has no place
        for one of its parameters.
    """
    target, entries = hosts.known(to), _mapping(source)
    flat = flatten(entries)
    host = host or _detect(flat)
    scopes = _known_scopes(flat, host)
    taken = {path for scope in scopes.values() for path in scope.paths.values()}
    kept = {} if to == "canonical" else {p: v for p, v in flat.items() if p not in taken}
    result = {files.key_of(path): value for path, value in kept.items()}
    for scope, (layer, params) in load(entries, host).items():
        if "canonical" not in (host, to) and _differ(host, to, layer):
            raise ValueError(
                f"{scope}: {to} computes {layer} otherwise than {host}, which makes the bias of "
                "its ending node from another pair. Convert to canonical, and call the layer with "
                f"{hosts.arguments(host, layer)}."
            )
        name = scopes[scope].parent + target.scopes[LAYERS.index(layer)]
        for leaf, value in from_canonical(params, to, layer).items():
            result[_key(to, name, leaf)] = value
    return result


def _differ(host: str, to: str, layer: str) -> bool:
    return hosts.arguments(host, layer) != hosts.arguments(to, layer)


def _key(host: str, scope: str, leaf: str) -> str:
    """A leaf's key in a flat checkpoint: haiku's 'scope/module//name', torch's 'scope.leaf'."""
    separator = hosts.known(host).separator
    if host.startswith("alphafold"):
        module, _, name = f"{scope}/{leaf}".rpartition("/")
        return f"{module}//{name}"
    return f"{scope}.{leaf}" if separator == "." else f"{scope}/{leaf}"


def _mapping(source: Source) -> Mapping:
    return source if isinstance(source, Mapping) else files.read(source)


def _scopes(flat: dict[tuple[str, ...], Any], host: str) -> dict[str, _Scope]:
    """The layers of a checkpoint by the host's scope names, whatever lies in them."""
    row = hosts.known(host)
    names = "|".join(row.scopes)
    pattern = re.compile(rf"(?P<parent>(?:.*[/.])?)(?P<name>{names})[/.](?P<leaf>.+)", re.DOTALL)
    found: dict[str, _Scope] = {}
    for path in flat:
        if match := pattern.fullmatch("/".join(path)):
            parent, name = match["parent"], match["name"]
            layer = LAYERS[row.scopes.index(name)]
            scope = found.setdefault(parent + name, _Scope(layer, parent, {}))
            scope.paths[own_leaf(match["leaf"], row.separator)] = path
    return found


def _problems(scopes: dict[str, _Scope], host: str) -> list[str]:
    """What does not fit about the leaf names of each scope."""
    row, problems = hosts.known(host), []
    for scope, (layer, _, paths) in scopes.items():
        is_attention = "attention" in layer
        if is_attention and row.attention is None:
            problems.append(f"{scope}: {host} has no attention layer")
        elif problem := misfit(paths, hosts.rules(host, layer), row):
            problems.append(f"{scope}: {problem}")
    return problems


def _known_scopes(flat: dict[tuple[str, ...], Any], host: str) -> dict[str, _Scope]:
    scopes = _scopes(flat, host)
    if not scopes:
        raise ValueError(_nothing(flat, (host,)))
    return scopes


def _detect(flat: dict[tuple[str, ...], Any]) -> str:
    candidates = {host: _scopes(flat, host) for host in HOSTS}
    candidates = {host: scopes for host, scopes in candidates.items() if scopes}
    if not candidates:
        raise ValueError(_nothing(flat, tuple(HOSTS)))
    problems = {host: _problems(scopes, host) for host, scopes in candidates.items()}
    # Several fit where they name all that is there alike, as AlphaFold 2's attention: any will do.
    for host, found in problems.items():
        if not found:
            return host
    listed = "\n".join(f"  {host}: {problem[0]}" for host, problem in problems.items())
    raise ValueError(
        f"found triangle layers by name, {', '.join(list(next(iter(candidates.values())))[:3])}, "
        f"but their leaves are no known host's. The first that does not fit:\n{listed}"
    )


def _nothing(flat: dict[tuple[str, ...], Any], names: tuple[str, ...]) -> str:
    examples = ", ".join(files.key_of(path) for path in list(flat)[:3]) or "none"
    known = "\n".join(f"  {name}: .../{_example(name)}" for name in names)
    return (
        f"no triangle layer found among {len(flat)} entries, such as {examples}. Known names, and "
        f"likewise for the other layers:\n{known}"
    )


def _example(host: str) -> str:
    row = hosts.known(host)
    return _key(host, row.scopes[0], row.multiplication["proj_in/kernel"].leaves[0])


def _copied(tree: Mapping) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value
