"""What examples/train.py fits: distance bins of real structures, by a pair stack of the layers."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import genie_tk_jax
from genie_tk_jax.demo import pair, proteins
from genie_tk_jax.demo.stack import C_Z, NO_HEADS, TRANSITION_FACTOR

# Upper edges in angstrom of all bins but the last (Jumper et al. 2021, supplementary 1.9.8).
EDGES = np.linspace(2.3125, 21.6875, 63)
BINS = len(EDGES) + 1
TYPES, OFFSETS = len(proteins.RESIDUE_TYPES), 2 * pair.MAX_OFFSET + 1


class Sample(NamedTuple):
    """A chain or a crop of one; a batch of crops has an axis more in front.

    types int32 [N], valid bool [N]: residues, and which of them are no padding.
    offsets int32 [N, N]: class of the relative position.
    bins int32 [N, N], known bool [N, N]: of the C-beta distance, and whether there is one.
    """

    types: np.ndarray
    valid: np.ndarray
    offsets: np.ndarray
    bins: np.ndarray
    known: np.ndarray


def sample(protein: proteins.Protein) -> Sample:
    """Residues without coordinates take part in all but the loss."""
    distance = pair.distances(protein.c_beta)
    known = np.isfinite(distance)
    bins = np.searchsorted(EDGES, np.where(known, distance, 0.0)).astype(np.int32)
    offsets = pair.relative_positions(protein.residue_index)
    valid = np.ones(len(protein.residue_types), bool)
    return Sample(protein.residue_types, valid, offsets, bins, known)


def draw(samples: list[Sample], step: int, *, seed: int, batch: int, crop: int) -> Sample:
    """The crops of a step, which depend on the seed and the step alone; short chains are padded."""
    rng = np.random.default_rng([seed, step])

    def one():
        chain = samples[rng.integers(len(samples))]
        start = rng.integers(max(len(chain.types) - crop, 0) + 1)
        cuts = (x[(slice(start, start + crop),) * x.ndim] for x in chain)
        return Sample(*(np.pad(x, [(0, crop - len(x))] * x.ndim) for x in cuts))

    return Sample(*map(np.stack, zip(*(one() for _ in range(batch)), strict=True)))


class Block(nnx.Module):
    """The four triangle layers and the transition, in the order of Algorithm 6, lines 6 to 10."""

    def __init__(self, dtype: Any, implementation: str | None, rngs: nnx.Rngs):
        how = {"residual": True, "implementation": implementation, "dtype": dtype, "rngs": rngs}
        heads = C_Z, C_Z // NO_HEADS, NO_HEADS
        wide, linear = TRANSITION_FACTOR * C_Z, partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.outgoing = genie_tk_jax.TriangleMultiplicationOutgoing(C_Z, C_Z, **how)
        self.incoming = genie_tk_jax.TriangleMultiplicationIncoming(C_Z, C_Z, **how)
        self.starting = genie_tk_jax.TriangleAttentionStartingNode(*heads, **how)
        self.ending = genie_tk_jax.TriangleAttentionEndingNode(*heads, **how)
        self.transition = nnx.Sequential(
            nnx.LayerNorm(C_Z, dtype=dtype, use_fast_variance=False, rngs=rngs),
            linear(C_Z, wide),
            nnx.relu,
            linear(wide, C_Z, kernel_init=nnx.initializers.zeros),
        )

    def __call__(self, z: jax.Array, mask: jax.Array) -> jax.Array:
        for layer in (self.outgoing, self.incoming, self.starting, self.ending):
            z = layer(z, mask)
        return z + self.transition(z)


class Distogram(nnx.Module):
    """Logits of the distance bins of every two residues, from their types and places alone."""

    def __init__(self, blocks: int, dtype: Any, implementation: str | None, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.left, self.right = linear(TYPES, C_Z), linear(TYPES, C_Z)
        self.position = linear(OFFSETS, C_Z)
        # One set of parameters with an axis in front, so that one block is compiled for all.
        stack = nnx.vmap(lambda rngs: Block(dtype, implementation, rngs))
        self.blocks = nnx.split_rngs(splits=blocks)(stack)(rngs)
        self.head = linear(C_Z, BINS, kernel_init=nnx.initializers.zeros)

    def __call__(self, batch: Sample) -> jax.Array:
        # One-hot products: their gradients are sums in a fixed order, those of a look-up are not.
        types = jax.nn.one_hot(batch.types, TYPES)
        z = self.left(types)[:, :, None] + self.right(types)[:, None]
        z = z + self.position(jax.nn.one_hot(batch.offsets, OFFSETS))
        mask = batch.valid[:, :, None] & batch.valid[:, None]

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, z):
            return block(z, mask)

        half = self.head(run(self.blocks, z))
        return half + half.swapaxes(1, 2)


def mean_loss(logits: jax.Array, batch: Sample) -> jax.Array:
    """Cross entropy in nats, the mean over all pairs whose distance is known."""
    bins = jax.nn.one_hot(batch.bins, BINS)
    loss = optax.softmax_cross_entropy(logits.astype(jnp.float32), bins)
    return jnp.sum(loss * batch.known) / jnp.maximum(jnp.sum(batch.known), 1)
