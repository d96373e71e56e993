"""The four triangle layers over the paper's indices, in float64 NumPy.

What the library is judged by, so it shares nothing with it: no JAX arithmetic, no batching, no
transposed calls. Every contraction spells the indices i, j, k of Jumper et al. 2021,
supplementary Algorithms 11 to 14; c is the pair channel, h the head, d the head channel.

z is [N, N, C], mask [N, N] or None; a pair is valid where its mask is not 0. params is the
canonical nested dict; a bias that is absent adds nothing. All results are float64.
"""

import jax
import numpy as np


def triangle_multiplication(z, mask, params, direction, residual=False, epsilon=1e-5):
    """Algorithm 11 for direction 'outgoing', Algorithm 12 for 'incoming'; [N, N, C]."""
    z, valid = _read(z, mask)
    x = _layer_norm(z, params["norm_in"], epsilon)
    ab = _sigmoid(_linear("ijc,cm->ijm", x, params["gate_in"]))
    ab = ab * _linear("ijc,cm->ijm", x, params["proj_in"]) * valid[..., None]
    a, b = np.split(ab, 2, axis=-1)
    terms = {"outgoing": "ikm,jkm->ijm", "incoming": "kim,kjm->ijm"}[direction]
    t = _layer_norm(np.einsum(terms, a, b), params["norm_out"], epsilon)
    update = _sigmoid(_linear("ijc,ce->ije", x, params["gate_out"]))
    update = update * _linear("ijm,mc->ijc", t, params["proj_out"])
    return z + update if residual else update


def triangle_attention(z, mask, params, node, ending_bias="swapped", residual=False, epsilon=1e-5):
    """Algorithm 13 for node 'starting', Algorithm 14 for 'ending'; [N, N, C].

    The paper's ending node adds b_ki, which is ending_bias 'swapped'; 'unswapped' adds b_ik.
    """
    assert node in ("starting", "ending"), node
    z, valid = _read(z, mask)
    x = _layer_norm(z, params["norm"], epsilon)
    q, k, v, gate = (_linear("ijc,chd->ijhd", x, params[name]) for name in ("q", "k", "v", "gate"))
    bias = _linear("ijc,ch->ijh", x, params["pair_bias"])
    if node == "starting":
        logits = np.einsum("ijhd,ikhd->ijhk", q, k) / np.sqrt(q.shape[-1])
        logits = logits + np.einsum("jkh->jhk", bias)
        o = np.einsum("ijhk,ikhd->ijhd", _softmax(logits, valid[:, None, None, :]), v)
    else:
        logits = np.einsum("ijhd,kjhd->ijhk", q, k) / np.sqrt(q.shape[-1])
        order = {"swapped": "kih->ihk", "unswapped": "ikh->ihk"}[ending_bias]
        logits = logits + np.einsum(order, bias)[:, None]
        o = np.einsum("ijhk,kjhd->ijhd", _softmax(logits, valid.T[None, :, None, :]), v)
    update = _linear("ijhd,hdc->ijc", _sigmoid(gate) * o, params["out"])
    return z + update if residual else update


def pair_attention(q, k, v, bias, mask):
    """Algorithm 13, lines 5 and 6 without the gate: q [I, Q, H, D] to [I, Q, H, D].

    k and v are [I, K, H, D], bias [H, Q, K], mask [I, K].
    """
    q, k, v, bias = (_float64(x) for x in (q, k, v, bias))
    logits = np.einsum("iqhd,ikhd->ihqk", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = _softmax(logits, (np.asarray(mask) != 0)[:, None, None, :])
    return np.einsum("ihqk,ikhd->iqhd", weights, v)


def central_difference(f, tree, cotangent, directions, step=1e-5):
    """Derivatives of sum(f(tree) * cotangent) along each of `directions`, float64 [len].

    A direction is a tree shaped like `tree`; one that is zero but for a leaf tests the gradient
    of that leaf. The error is of the order step**2 plus 1e-16 / step, relative to f.
    """

    def value(direction, by):
        moved = jax.tree.map(lambda x, d: _float64(x) + by * _float64(d), tree, direction)
        return np.vdot(f(moved), _float64(cotangent))

    return np.array([(value(d, step) - value(d, -step)) / (2 * step) for d in directions])


def _float64(x):
    return np.asarray(x).astype(np.float64)


def _read(z, mask):
    """z with zeros for the masked pairs that hold inf or NaN, and the valid pairs as bool."""
    z = _float64(z)
    valid = np.ones(z.shape[:2], bool) if mask is None else np.asarray(mask) != 0
    garbage = ~valid & ~np.isfinite(z).all(axis=-1)
    return np.where(garbage[..., None], 0.0, z), valid


def _layer_norm(x, params, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scale, bias = _float64(params["scale"]), _float64(params["bias"])
    return centred / np.sqrt(variance + epsilon) * scale + bias


def _linear(terms, x, params):
    y = np.einsum(terms, x, _float64(params["kernel"]))
    return y + _float64(params["bias"]) if "bias" in params else y


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _softmax(logits, valid):
    """Softmax over the last axis among the valid keys; zeros where no key is valid."""
    logits = np.where(valid, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)
