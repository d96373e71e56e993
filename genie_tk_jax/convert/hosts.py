"""How each host names and lays out the parameters of the triangle layers.

A rule says in which host leaf a canonical leaf lies, and with which axes. Axes are named alike on
both sides, and a host's leaf is reshaped and transposed into the canonical one:

  c  pair channels          h  heads               s  the two operands of triangle multiplication
  m  hidden channels        d  channels per head   e  pair channels again, as an output

Parentheses merge axes, slowest first: "c (s m)" are columns in two halves, "c (m s)" interleaved
columns. A rule with two leaves stacks them along a leading s.
"""

from typing import Any, NamedTuple

OUTGOING, INCOMING, STARTING, ENDING = LAYERS = (
    "triangle_multiplication_outgoing",
    "triangle_multiplication_incoming",
    "triangle_attention_starting_node",
    "triangle_attention_ending_node",
)


class Rule(NamedTuple):
    """The host's leaf, or the two that hold one operand each, and the axes."""

    leaves: tuple[str, ...]
    axes: str


Rules = dict[str, Rule]


class Host(NamedTuple):
    """One layout: scope names, how leaf names are joined, the rules, and what differs in the maths.

    Attributes:
      scopes: the last part of a layer's scope, for each of LAYERS.
      separator: joins module and parameter in a leaf's name.
      attention: None where the host has no attention layer.
      incoming_swapped: the host's first operand of the incoming multiplication is the paper's b.
      square: c_hidden must be c_z.
      optional: biases may be absent; elsewhere all rules are needed, and no other leaf has a place.
      ending_bias: the convention of the ending node.
    """

    scopes: tuple[str, ...]
    separator: str
    multiplication: Rules
    attention: Rules | None = None
    incoming_swapped: bool = False
    square: bool = False
    optional: bool = False
    ending_bias: str = "swapped"


_TORCH, _HAIKU = ("weight", "bias"), ("scale", "offset")


def _norm(group: str, module: str, axis: str, names: tuple[str, str]) -> Rules:
    scale, bias = (Rule((module + name,), axis) for name in names)
    return {f"{group}/scale": scale, f"{group}/bias": bias}


def _linear(
    group: str, modules: str | tuple[str, str], kernel: str, bias: str | None, name: str = "weights"
) -> Rules:
    owners = (modules,) if isinstance(modules, str) else modules
    rules = {f"{group}/kernel": Rule(tuple(owner + name for owner in owners), kernel)}
    if bias:
        rules[f"{group}/bias"] = Rule(tuple(owner + "bias" for owner in owners), bias)
    return rules


def _canonical_multiplication() -> Rules:
    names = ("scale", "bias")
    return {
        **_norm("norm_in", "norm_in/", "c", names),
        **_linear("proj_in", "proj_in/", "c (s m)", "(s m)", "kernel"),
        **_linear("gate_in", "gate_in/", "c (s m)", "(s m)", "kernel"),
        **_norm("norm_out", "norm_out/", "m", names),
        **_linear("proj_out", "proj_out/", "m e", "e", "kernel"),
        **_linear("gate_out", "gate_out/", "c e", "e", "kernel"),
    }


def _canonical_attention() -> Rules:
    return {
        **_norm("norm", "norm/", "c", ("scale", "bias")),
        **_linear("pair_bias", "pair_bias/", "c h", None, "kernel"),
        **_linear("q", "q/", "c h d", None, "kernel"),
        **_linear("k", "k/", "c h d", None, "kernel"),
        **_linear("v", "v/", "c h d", None, "kernel"),
        **_linear("gate", "gate/", "c h d", "h d", "kernel"),
        **_linear("out", "out/", "h d e", "e", "kernel"),
    }


def _alphafold2_multiplication(fused: bool) -> Rules:
    names = ("left_norm_input/", "center_norm/")
    projection, gate, axes, bias = "projection/", "gate/", "c (s m)", "(s m)"
    if not fused:
        names = ("layer_norm_input/", "center_layer_norm/")
        projection, gate = ("left_projection/", "right_projection/"), ("left_gate/", "right_gate/")
        axes, bias = "s c m", "s m"
    return {
        **_norm("norm_in", names[0], "c", _HAIKU),
        **_linear("proj_in", projection, axes, bias),
        **_linear("gate_in", gate, axes, bias),
        **_norm("norm_out", names[1], "m", _HAIKU),
        **_linear("proj_out", "output_projection/", "m e", "e"),
        **_linear("gate_out", "gating_linear/", "c e", "e"),
    }


def _alphafold2_attention() -> Rules:
    return {
        **_norm("norm", "query_norm/", "c", _HAIKU),
        "pair_bias/kernel": Rule(("feat_2d_weights",), "c h"),
        "q/kernel": Rule(("attention/query_w",), "c h d"),
        "k/kernel": Rule(("attention/key_w",), "c h d"),
        "v/kernel": Rule(("attention/value_w",), "c h d"),
        "gate/kernel": Rule(("attention/gating_w",), "c h d"),
        "gate/bias": Rule(("attention/gating_b",), "h d"),
        "out/kernel": Rule(("attention/output_w",), "h d e"),
        "out/bias": Rule(("attention/output_b",), "e"),
    }


def _alphafold3_multiplication() -> Rules:
    return {
        **_norm("norm_in", "left_norm_input/", "c", _HAIKU),
        **_linear("proj_in", "projection/", "c (m s)", None),
        **_linear("gate_in", "gate/", "c (m s)", None),
        **_norm("norm_out", "center_norm/", "m", _HAIKU),
        **_linear("proj_out", "output_projection/", "m e", None),
        **_linear("gate_out", "gating_linear/", "c e", None),
    }


def _alphafold3_attention() -> Rules:
    return {
        **_norm("norm", "act_norm/", "c", _HAIKU),
        **_linear("pair_bias", "pair_bias_projection/", "c h", None),
        **_linear("q", "q_projection/", "h d c", None),
        **_linear("k", "k_projection/", "h d c", None),
        **_linear("v", "v_projection/", "c h d", None),
        **_linear("gate", "gating_query/", "(h d) c", None),
        **_linear("out", "output_projection/", "(h d) e", None),
    }


def _openfold_multiplication(fused: bool) -> Rules:
    projection, gate = "linear_ab_p.", "linear_ab_g."
    axes, bias = "(s m) c", "(s m)"
    if not fused:
        projection, gate = ("linear_a_p.", "linear_b_p."), ("linear_a_g.", "linear_b_g.")
        axes, bias = "s m c", "s m"
    return {
        **_norm("norm_in", "layer_norm_in.", "c", _TORCH),
        **_linear("proj_in", projection, axes, bias, "weight"),
        **_linear("gate_in", gate, axes, bias, "weight"),
        **_norm("norm_out", "layer_norm_out.", "m", _TORCH),
        **_linear("proj_out", "linear_z.", "e m", "e", "weight"),
        **_linear("gate_out", "linear_g.", "e c", "e", "weight"),
    }


def _openfold_attention(bias: bool) -> Rules:
    rows = "(h d) c"
    return {
        **_norm("norm", "layer_norm.", "c", _TORCH),
        **_linear("pair_bias", "linear.", "h c", None, "weight"),
        **_linear("q", "mha.linear_q.", rows, None, "weight"),
        **_linear("k", "mha.linear_k.", rows, None, "weight"),
        **_linear("v", "mha.linear_v.", rows, None, "weight"),
        **_linear("gate", "mha.linear_g.", rows, "(h d)" if bias else None, "weight"),
        **_linear("out", "mha.linear_o.", "e (h d)", "e" if bias else None, "weight"),
    }


def _boltz_multiplication(separator: str, bias: bool) -> Rules:
    halves, out = ("(s m)", "e") if bias else (None, None)
    return {
        **_norm("norm_in", f"norm_in{separator}", "c", _TORCH),
        **_linear("proj_in", f"p_in{separator}", "(s m) c", halves, "weight"),
        **_linear("gate_in", f"g_in{separator}", "(s m) c", halves, "weight"),
        **_norm("norm_out", f"norm_out{separator}", "m", _TORCH),
        **_linear("proj_out", f"p_out{separator}", "e m", out, "weight"),
        **_linear("gate_out", f"g_out{separator}", "e c", out, "weight"),
    }


def _tokamax_multiplication() -> Rules:
    return {
        **_norm("norm_in", "layernorm_in_", "c", _HAIKU),
        **_linear("proj_in", "projection_in_", "c s m", None),
        **_linear("gate_in", "gate_in_", "c s m", None),
        **_norm("norm_out", "layernorm_out_", "m", _HAIKU),
        **_linear("proj_out", "projection_out_", "m e", None),
        **_linear("gate_out", "gate_out_", "c e", None),
    }


_ALPHAFOLD3_SCOPES = (OUTGOING, INCOMING, "pair_attention1", "pair_attention2")
_TORCH_SCOPES = ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end")


def _alphafold2(fused: bool) -> Host:
    rules = _alphafold2_multiplication(fused), _alphafold2_attention()
    return Host(LAYERS, "/", *rules, incoming_swapped=True)


def _openfold(fused: bool) -> Host:
    return Host(_TORCH_SCOPES, ".", _openfold_multiplication(fused), _openfold_attention(bias=True))


CANONICAL = Host(LAYERS, "/", _canonical_multiplication(), _canonical_attention(), optional=True)

HOSTS = {
    "canonical": CANONICAL,
    "alphafold2": _alphafold2(fused=False),
    "alphafold2_fused": _alphafold2(fused=True),
    "alphafold3": Host(
        _ALPHAFOLD3_SCOPES,
        "/",
        _alphafold3_multiplication(),
        _alphafold3_attention(),
        incoming_swapped=True,
        square=True,
        ending_bias="unswapped",
    ),
    "openfold": _openfold(fused=False),
    "openfold_fused": _openfold(fused=True),
    "boltz": Host(
        _TORCH_SCOPES,
        ".",
        _boltz_multiplication(".", bias=False),
        _openfold_attention(bias=False),
        square=True,
    ),
    "cuequivariance": Host(
        LAYERS, "_", _boltz_multiplication("_", bias=True), square=True, optional=True
    ),
    "tokamax": Host(LAYERS, "_", _tokamax_multiplication(), incoming_swapped=True),
}
# ESMFold and Genie hold OpenFold's unfused classes; `detect` answers with the first name.
HOSTS["esmfold"] = HOSTS["genie"] = HOSTS["openfold"]


def arguments(host: str, layer: str) -> dict[str, Any]:
    """The keywords with which `triangle_multiplication` or `triangle_attention` is this layer.

    The trees of AlphaFold 3 and AlphaFold 2 look alike, but the ending nodes differ: AlphaFold 3
    makes its bias from the pair as it is, ending_bias 'unswapped'. AlphaFold 3 also hands its
    starting node the transposed mask, which only shows where masks are not symmetric.
    """
    if layer in (OUTGOING, INCOMING):
        return {"direction": "outgoing" if layer == OUTGOING else "incoming"}
    if layer == STARTING:
        return {"node": "starting"}
    return {"node": "ending", "ending_bias": known(host).ending_bias}


def known(host: str) -> Host:
    """The host of that name."""
    if host not in HOSTS:
        raise ValueError(f"host must be one of {', '.join(HOSTS)}; got {host!r}.")
    return HOSTS[host]


def rules(host: str, layer: str) -> Rules:
    """The rules of one layer of a host."""
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}; got {layer!r}.")
    found = known(host)
    chosen = found.multiplication if layer in (OUTGOING, INCOMING) else found.attention
    if chosen is None:
        raise ValueError(
            f"{host} has no parameters for {layer}: its attention takes q, k and v ready-made. "
            f"Convert to one of {', '.join(name for name, row in HOSTS.items() if row.attention)}."
        )
    return chosen
