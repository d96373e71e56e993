"""Each host's triangle layers in that host's own layout, operand order and words, in float64.

Written down from the hosts' sources, not from `genie_tk_jax.convert`: a layer takes z [N, N, C],
mask [N, N] and the host's own leaves, flat, and gives the update. C is c_z, M c_hidden, H no_heads
and D the channels of a head.
"""

import numpy as np

C, M, H, D = 8, 6, 3, 4
KINDS = ("outgoing", "incoming", "starting", "ending")
MULTIPLICATION, ATTENTION = KINDS[:2], KINDS[2:]


def _norm_and_linears(norms, linears, scale, offset, weight, bias):
    shapes = {}
    for name, width in norms.items():
        shapes |= {name + scale: (width,), name + offset: (width,)}
    for name, (kernel, out) in linears.items():
        shapes[name + weight] = kernel
        if out is not None and bias is not None:
            shapes[name + bias] = out
    return shapes


def _alphafold2(fused):
    operands = {name + "/": ((C, 2 * M), (2 * M,)) for name in ("projection", "gate")}
    norms = {"left_norm_input/": C, "center_norm/": M}
    if not fused:
        names = ("left_projection", "right_projection", "left_gate", "right_gate")
        operands = {name + "/": ((C, M), (M,)) for name in names}
        norms = {"layer_norm_input/": C, "center_layer_norm/": M}
    outputs = {"output_projection/": ((M, C), (C,)), "gating_linear/": ((C, C), (C,))}
    names = ("scale", "offset", "weights", "bias")
    attention = {
        "feat_2d_weights": (C, H),
        "query_norm/scale": (C,),
        "query_norm/offset": (C,),
        **{f"attention/{name}_w": (C, H, D) for name in ("query", "key", "value", "gating")},
        "attention/gating_b": (H, D),
        "attention/output_w": (H, D, C),
        "attention/output_b": (C,),
    }
    return _norm_and_linears(norms, operands | outputs, *names), attention


def _alphafold3():
    wide, square = ((C, 2 * C), None), ((C, C), None)
    linears = {"projection/": wide, "gate/": wide}
    linears |= {"output_projection/": square, "gating_linear/": square}
    names = ("scale", "offset", "weights", None)
    norms = {"left_norm_input/": C, "center_norm/": C}
    attention = {
        "act_norm/scale": (C,),
        "act_norm/offset": (C,),
        "pair_bias_projection/weights": (C, H),
        "q_projection/weights": (H, D, C),
        "k_projection/weights": (H, D, C),
        "v_projection/weights": (C, H, D),
        "gating_query/weights": (H * D, C),
        "output_projection/weights": (H * D, C),
    }
    return _norm_and_linears(norms, linears, *names), attention


def _openfold(fused):
    names = ("linear_ab_p.", "linear_ab_g.")
    operands = {name: ((2 * M, C), (2 * M,)) for name in names}
    if not fused:
        names = ("linear_a_p.", "linear_a_g.", "linear_b_p.", "linear_b_g.")
        operands = {name: ((M, C), (M,)) for name in names}
    outputs = {"linear_z.": ((C, M), (C,)), "linear_g.": ((C, C), (C,))}
    norms, torch = {"layer_norm_in.": C, "layer_norm_out.": M}, ("weight", "bias") * 2
    return _norm_and_linears(norms, operands | outputs, *torch), _openfold_attention("bias")


def _openfold_attention(bias):
    linears = {"linear.": ((H, C), None)}
    linears |= {f"mha.linear_{name}.": ((H * D, C), None) for name in "qkv"}
    linears |= {"mha.linear_g.": ((H * D, C), (H * D,)), "mha.linear_o.": ((C, H * D), (C,))}
    return _norm_and_linears({"layer_norm.": C}, linears, "weight", "bias", "weight", bias)


def _boltz(separator, bias):
    linears = {f"{name}{separator}": ((2 * C, C), (2 * C,)) for name in ("p_in", "g_in")}
    linears |= {f"{name}{separator}": ((C, C), (C,)) for name in ("p_out", "g_out")}
    norms = {f"norm_in{separator}": C, f"norm_out{separator}": C}
    return _norm_and_linears(norms, linears, "weight", "bias", "weight", bias)


def _tokamax():
    linears = {"projection_in_": ((C, 2, M), None), "gate_in_": ((C, 2, M), None)}
    linears |= {"projection_out_": ((M, C), None), "gate_out_": ((C, C), None)}
    norms = {"layernorm_in_": C, "layernorm_out_": M}
    return _norm_and_linears(norms, linears, "scale", "offset", "weights", None)


# The leaves and shapes of the multiplication and, where there is one, of the attention.
SHAPES = {
    "alphafold2": _alphafold2(fused=False),
    "alphafold2_fused": _alphafold2(fused=True),
    "alphafold3": _alphafold3(),
    "openfold": _openfold(fused=False),
    "openfold_fused": _openfold(fused=True),
    "esmfold": _openfold(fused=False),
    "genie": _openfold(fused=False),
    "boltz": (_boltz(".", None), _openfold_attention(None)),
    "cuequivariance": (_boltz("_", "bias"), None),
    "tokamax": (_tokamax(), None),
}
CASES = [
    (host, kind)
    for host, (_, attention) in SHAPES.items()
    for kind in (KINDS if attention else MULTIPLICATION)
]
LAYERS = {
    "outgoing": "triangle_multiplication_outgoing",
    "incoming": "triangle_multiplication_incoming",
    "starting": "triangle_attention_starting_node",
    "ending": "triangle_attention_ending_node",
}


def leaves(host, kind, seed=0, stack=(), dtype=np.float32):
    """Random leaves of a host's layer, none zero or constant."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES[host][0 if kind in MULTIPLICATION else 1]
    return {
        name: (rng.normal(size=(*stack, *shape)) + ("scale" in name)).astype(dtype)
        for name, shape in shapes.items()
    }


def layer(host, kind, z, mask, p):
    """The update of a host's layer."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in p.items()}
    mask = mask.astype(np.float64)
    if host.startswith("alphafold2"):
        if kind in ATTENTION:
            return _alphafold2_attention(kind, z, mask, p)
        return _alphafold2_multiplication(kind, z, mask, p, host.endswith("fused"))
    if host == "alphafold3":
        layer = _alphafold3_attention if kind in ATTENTION else _alphafold3_multiplication
        return layer(kind, z, mask, p)
    if host == "tokamax":
        return _tokamax_multiplication(kind, z, mask, p)
    if kind in ATTENTION:
        return _torch_attention(kind, z, mask, p)
    return _paper_order_multiplication(host, kind, z, mask, p)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _normed(x, scale, offset, axis=-1):
    x = x - x.mean(axis, keepdims=True)
    shape = [1] * x.ndim
    shape[axis] = -1
    y = x / np.sqrt((x**2).mean(axis, keepdims=True) + 1e-5)
    return y * scale.reshape(shape) + offset.reshape(shape)


def _softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _alphafold2_multiplication(kind, z, mask, p, fused):
    mask = mask[..., None]
    names = (
        ("left_norm_input", "center_norm") if fused else ("layer_norm_input", "center_layer_norm")
    )

    def linear(name, x):
        return x @ p[f"{name}/weights"] + p[f"{name}/bias"]

    act = _normed(z, p[f"{names[0]}/scale"], p[f"{names[0]}/offset"])
    if fused:
        both = mask * linear("projection", act) * _sigmoid(linear("gate", act))
        left, right = both[..., :M], both[..., M:]
    else:
        left = mask * linear("left_projection", act) * _sigmoid(linear("left_gate", act))
        right = mask * linear("right_projection", act) * _sigmoid(linear("right_gate", act))
    equation = {"outgoing": "ikc,jkc->ijc", "incoming": "kjc,kic->ijc"}[kind]
    t = np.einsum(equation, left, right)
    t = _normed(t, p[f"{names[1]}/scale"], p[f"{names[1]}/offset"])
    return linear("output_projection", t) * _sigmoid(linear("gating_linear", act))


def _alphafold2_attention(kind, z, mask, p):
    if kind == "ending":
        z, mask = z.swapaxes(0, 1), mask.swapaxes(0, 1)
    act = _normed(z, p["query_norm/scale"], p["query_norm/offset"])
    nonbatched_bias = np.einsum("qkc,ch->hqk", act, p["feat_2d_weights"])
    q = np.einsum("bqa,ahc->bqhc", act, p["attention/query_w"]) * D**-0.5
    k = np.einsum("bka,ahc->bkhc", act, p["attention/key_w"])
    v = np.einsum("bka,ahc->bkhc", act, p["attention/value_w"])
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) + (1e9 * (mask - 1))[:, None, None]
    average = np.einsum("bhqk,bkhc->bqhc", _softmax(logits + nonbatched_bias), v)
    gate = np.einsum("bqc,chv->bqhv", act, p["attention/gating_w"]) + p["attention/gating_b"]
    out = np.einsum("bqhc,hco->bqo", average * _sigmoid(gate), p["attention/output_w"])
    out = out + p["attention/output_b"]
    return out.swapaxes(0, 1) if kind == "ending" else out


def _alphafold3_multiplication(kind, z, mask, p):
    act = _normed(z, p["left_norm_input/scale"], p["left_norm_input/offset"])
    both = (act @ p["projection/weights"]).transpose(2, 0, 1) * mask
    both = both * _sigmoid(act @ p["gate/weights"]).transpose(2, 0, 1)
    a, b = (x[:, 0] for x in np.split(both.reshape(-1, 2, *mask.shape), 2, axis=1))
    equation = {"outgoing": "cik,cjk->cij", "incoming": "ckj,cki->cij"}[kind]
    t = _normed(np.einsum(equation, a, b), p["center_norm/scale"], p["center_norm/offset"], axis=0)
    out = t.transpose(1, 2, 0) @ p["output_projection/weights"]
    return out * _sigmoid(act @ p["gating_linear/weights"])


def _alphafold3_attention(kind, z, mask, p):
    """The bias is made before the swap, and the mask is transposed in both nodes."""
    act = _normed(z, p["act_norm/scale"], p["act_norm/offset"])
    bias = np.einsum("qkc,ch->hqk", act, p["pair_bias_projection/weights"])
    mask = mask.swapaxes(0, 1)
    if kind == "ending":
        act = act.swapaxes(0, 1)
    q = np.einsum("bqc,hdc->bqhd", act, p["q_projection/weights"]) / np.sqrt(
        p["q_projection/weights"].shape[1]
    )
    k = np.einsum("bkc,hdc->bkhd", act, p["k_projection/weights"])
    v = np.einsum("bkc,chd->bkhd", act, p["v_projection/weights"])
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) + bias
    logits = np.where(mask[:, None, None, :] > 0, logits, np.finfo(np.float32).min)
    average = np.einsum("bhqk,bkhd->bqhd", _softmax(logits), v)
    average = average.reshape(*average.shape[:2], -1)
    average = average * _sigmoid(act @ p["gating_query/weights"].T)
    out = average @ p["output_projection/weights"]
    return out.swapaxes(0, 1) if kind == "ending" else out


def _paper_order_multiplication(host, kind, z, mask, p):
    """OpenFold, ESMFold, Genie, Boltz and cuEquivariance: torch weights, a and b as the paper."""
    own = host in ("boltz", "cuequivariance")
    dot = "_" if host == "cuequivariance" else "."
    norms = ("norm_in", "norm_out") if own else ("layer_norm_in", "layer_norm_out")

    def linear(name, x):
        return x @ p[f"{name}{dot}weight"].T + p.get(f"{name}{dot}bias", 0)

    def gated(projection, gate):
        return mask[..., None] * _sigmoid(linear(gate, x)) * linear(projection, x)

    x = _normed(z, p[f"{norms[0]}{dot}weight"], p[f"{norms[0]}{dot}bias"])
    if own:
        a, b = np.split(gated("p_in", "g_in"), 2, axis=-1)
    elif "linear_ab_p.weight" in p:
        ab = gated("linear_ab_p", "linear_ab_g")
        a, b = ab[..., :M], ab[..., M:]
    else:
        a, b = gated("linear_a_p", "linear_a_g"), gated("linear_b_p", "linear_b_g")
    t = np.einsum({"outgoing": "ikd,jkd->ijd", "incoming": "kid,kjd->ijd"}[kind], a, b)
    t = _normed(t, p[f"{norms[1]}{dot}weight"], p[f"{norms[1]}{dot}bias"])
    out, gate = ("p_out", "g_out") if own else ("linear_z", "linear_g")
    return linear(out, t) * _sigmoid(linear(gate, x))


def _torch_attention(kind, z, mask, p):
    """OpenFold's TriangleAttention; Boltz's has no bias in gate and output."""
    if kind == "ending":
        z, mask = z.swapaxes(0, 1), mask.swapaxes(0, 1)
    n = len(z)
    x = _normed(z, p["layer_norm.weight"], p["layer_norm.bias"])
    triangle_bias = (x @ p["linear.weight"].T).transpose(2, 0, 1)

    def heads(name):
        y = x @ p[f"mha.linear_{name}.weight"].T + p.get(f"mha.linear_{name}.bias", 0)
        return y.reshape(n, n, H, D).transpose(0, 2, 1, 3)

    logits = heads("q") / np.sqrt(D) @ heads("k").swapaxes(-1, -2)
    logits = logits + 1e9 * (mask[:, None, None, :] - 1) + triangle_bias
    o = _softmax(logits) @ heads("v") * _sigmoid(heads("g"))
    o = o.transpose(0, 2, 1, 3).reshape(n, n, H * D)
    out = o @ p["mha.linear_o.weight"].T + p.get("mha.linear_o.bias", 0)
    return out.swapaxes(0, 1) if kind == "ending" else out


def _tokamax_multiplication(kind, z, mask, p):
    """AlphaFold 2's order of operands: for incoming the first is indexed (k, j)."""
    x = _normed(z, p["layernorm_in_scale"], p["layernorm_in_offset"])
    both = np.einsum("ijc,csh->ijsh", x, p["projection_in_weights"])
    both = both * _sigmoid(np.einsum("ijc,csh->ijsh", x, p["gate_in_weights"]))
    both = both * mask[..., None, None]
    equation = {"outgoing": "ikh,jkh->ijh", "incoming": "kjh,kih->ijh"}[kind]
    t = np.einsum(equation, both[:, :, 0], both[:, :, 1])
    t = _normed(t, p["layernorm_out_scale"], p["layernorm_out_offset"])
    return t @ p["projection_out_weights"] * _sigmoid(x @ p["gate_out_weights"])
