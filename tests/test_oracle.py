"""The oracle against loops over i, j and k that use nothing but sums, and the mask contracts."""

import math

import numpy as np
import oracle
import pytest

N, C, HIDDEN, HEADS, D = 4, 6, 5, 2, 3
MULTIPLICATION = {
    "norm_in": {"scale": (C,), "bias": (C,)},
    "proj_in": {"kernel": (C, 2 * HIDDEN), "bias": (2 * HIDDEN,)},
    "gate_in": {"kernel": (C, 2 * HIDDEN), "bias": (2 * HIDDEN,)},
    "norm_out": {"scale": (HIDDEN,), "bias": (HIDDEN,)},
    "proj_out": {"kernel": (HIDDEN, C), "bias": (C,)},
    "gate_out": {"kernel": (C, C), "bias": (C,)},
}
ATTENTION = {
    "norm": {"scale": (C,), "bias": (C,)},
    "pair_bias": {"kernel": (C, HEADS)},
    "q": {"kernel": (C, HEADS, D)},
    "k": {"kernel": (C, HEADS, D)},
    "v": {"kernel": (C, HEADS, D)},
    "gate": {"kernel": (C, HEADS, D), "bias": (HEADS, D)},
    "out": {"kernel": (HEADS, D, C), "bias": (C,)},
}
CONVENTIONS = [("starting", "swapped"), ("ending", "swapped"), ("ending", "unswapped")]


def draw(shapes, seed, biases=True):
    """Random leaves; without `biases` the linear layers have none, as in AlphaFold 3."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            leaf: rng.normal(size=shape)
            for leaf, shape in leaves.items()
            if biases or leaf != "bias" or name.startswith("norm")
        }
        for name, leaves in shapes.items()
    }


@pytest.fixture
def z():
    return np.random.default_rng(0).normal(size=(N, N, C))


@pytest.fixture
def mask():
    """Asymmetric, with row 2 and column 1 fully masked, valid pairs not all 1."""
    mask = np.array([[1, 0, 1, 1], [1, 0, 0, 2], [0, 0, 0, 0], [0.5, 0, 1, 0]])
    assert not mask[2].any() and not mask[:, 1].any()
    return mask


def normalised(z, norm):
    """LayerNorm of every pair by the textbook."""
    x = np.empty_like(z)
    for pair in np.ndindex(z.shape[:2]):
        mean = sum(z[pair]) / len(z[pair])
        variance = sum((value - mean) ** 2 for value in z[pair]) / len(z[pair])
        x[pair] = (z[pair] - mean) / math.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(x, params, axes=1):
    return np.tensordot(x, params["kernel"], axes=axes) + params.get("bias", 0.0)


def multiplication_by_loops(z, mask, params, direction):
    x = normalised(z, params["norm_in"])
    ab = np.zeros((N, N, 2 * HIDDEN))
    for pair in np.ndindex(N, N):
        if mask[pair]:
            ab[pair] = sigmoid(linear(x[pair], params["gate_in"])) * linear(
                x[pair], params["proj_in"]
            )
    a, b = ab[..., :HIDDEN], ab[..., HIDDEN:]
    t = np.zeros((N, N, HIDDEN))
    for i, j, k in np.ndindex(N, N, N):
        t[i, j] += a[i, k] * b[j, k] if direction == "outgoing" else a[k, i] * b[k, j]
    y = linear(normalised(t, params["norm_out"]), params["proj_out"])
    return y * sigmoid(linear(x, params["gate_out"]))


def attention_by_loops(z, mask, params, node, ending_bias):
    x = normalised(z, params["norm"])
    out = np.empty((N, N, C))
    for i, j in np.ndindex(N, N):
        o = np.zeros((HEADS, D))
        q, gate = linear(x[i, j], params["q"]), sigmoid(linear(x[i, j], params["gate"]))
        for h in range(HEADS):
            weights, values = [], []
            for k in range(N):
                key = (i, k) if node == "starting" else (k, j)
                bias = {"starting": (j, k), "swapped": (k, i), "unswapped": (i, k)}[
                    node if node == "starting" else ending_bias
                ]
                if mask[key]:
                    logit = q[h] @ linear(x[key], params["k"])[h] / math.sqrt(D)
                    logit += linear(x[bias], params["pair_bias"])[h]
                    weights.append(math.exp(logit))
                    values.append(linear(x[key], params["v"])[h])
            if weights:
                o[h] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        out[i, j] = linear(gate * o, params["out"], axes=2)
    return out


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_multiplication_is_the_loop(z, mask, direction, biases):
    params = draw(MULTIPLICATION, 1, biases)
    truth = multiplication_by_loops(z, mask, params, direction)
    found = oracle.triangle_multiplication(z, mask, params, direction)
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-12)
    with_residual = oracle.triangle_multiplication(z, mask, params, direction, residual=True)
    np.testing.assert_allclose(with_residual, z + truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("node", "ending_bias"), CONVENTIONS)
def test_attention_is_the_loop(z, mask, node, ending_bias, biases):
    params = draw(ATTENTION, 1, biases)
    truth = attention_by_loops(z, mask, params, node, ending_bias)
    found = oracle.triangle_attention(z, mask, params, node, ending_bias)
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-12)
    with_residual = oracle.triangle_attention(z, mask, params, node, ending_bias, residual=True)
    np.testing.assert_allclose(with_residual, z + truth, rtol=1e-12, atol=1e-12)


def test_no_mask_is_a_mask_of_ones(z):
    multiplication, attention = draw(MULTIPLICATION, 1), draw(ATTENTION, 1)
    for mask in (np.ones((N, N), bool), np.ones((N, N), np.int32)):
        np.testing.assert_array_equal(
            oracle.triangle_multiplication(z, None, multiplication, "outgoing"),
            oracle.triangle_multiplication(z, mask, multiplication, "outgoing"),
        )
        np.testing.assert_array_equal(
            oracle.triangle_attention(z, None, attention, "ending"),
            oracle.triangle_attention(z, mask, attention, "ending"),
        )


def test_position_without_keys_gives_the_output_bias(z, mask):
    params = draw(ATTENTION, 1)
    starting = oracle.triangle_attention(z, mask, params, "starting")
    ending = oracle.triangle_attention(z, mask, params, "ending")
    bias = np.broadcast_to(params["out"]["bias"], (N, C))
    np.testing.assert_array_equal(starting[2], bias)
    np.testing.assert_array_equal(ending[:, 1], bias)
    assert np.abs(starting[:2] - params["out"]["bias"]).min(axis=-1).max() > 1e-3


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_under_the_mask_reads_as_zeros(z, mask, garbage):
    spoilt, zeroed = z.copy(), z.copy()
    spoilt[0, 1, 2] = garbage
    zeroed[0, 1] = 0.0
    multiplication, attention = draw(MULTIPLICATION, 1), draw(ATTENTION, 1)
    for direction in ("outgoing", "incoming"):
        np.testing.assert_array_equal(
            oracle.triangle_multiplication(spoilt, mask, multiplication, direction, residual=True),
            oracle.triangle_multiplication(zeroed, mask, multiplication, direction, residual=True),
        )
    for node in ("starting", "ending"):
        np.testing.assert_array_equal(
            oracle.triangle_attention(spoilt, mask, attention, node),
            oracle.triangle_attention(zeroed, mask, attention, node),
        )
    with np.errstate(invalid="ignore"):
        assert np.isnan(oracle.triangle_attention(spoilt, None, attention, "starting")).any()


def test_pair_attention_is_the_loop():
    rng = np.random.default_rng(2)
    rows, queries, keys = 3, 2, 5
    q = rng.normal(size=(rows, queries, HEADS, D))
    k, v = rng.normal(size=(2, rows, keys, HEADS, D))
    bias = rng.normal(size=(HEADS, queries, keys))
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
    found = oracle.pair_attention(q, k, v, bias, mask)
    for i, j, h in np.ndindex(rows, queries, HEADS):
        logits = {t: q[i, j, h] @ k[i, t, h] / math.sqrt(D) + bias[h, j, t] for t in range(keys)}
        weights = {t: math.exp(logit) * mask[i, t] for t, logit in logits.items()}
        total = sum(weights.values()) or 1.0
        truth = sum(weight / total * v[i, t, h] for t, weight in weights.items())
        np.testing.assert_allclose(found[i, j, h], truth, rtol=1e-12, atol=1e-12)
    assert not found[1].any()


def test_central_difference_knows_a_derivative():
    tree = {"a": np.array([1.0, 2.0]), "b": {"c": np.array([3.0], np.float32)}}
    directions = [
        {"a": np.array([1.0, 0.0]), "b": {"c": np.array([0.0])}},
        {"a": np.array([0.0, 0.0]), "b": {"c": np.array([2.0])}},
    ]
    found = oracle.central_difference(
        lambda t: t["a"] ** 2 * t["b"]["c"], tree, np.array([10.0, 1.0]), directions
    )
    # 10 a0^2 c + a1^2 c: along a0 20 a0 c = 60, along c 2 (10 a0^2 + a1^2) = 28.
    np.testing.assert_allclose(found, [60.0, 28.0], rtol=1e-9)
