"""The pair representation that AlphaFold 2 starts from, with seeded random weights."""

import jax
import jax.numpy as jnp
import numpy as np

from genie_tk_jax.demo.proteins import RESIDUE_TYPES, Protein

MAX_OFFSET = 32
# Lower edges in angstrom; the last bin has no upper one.
DISTANCE_BINS = np.linspace(3.25, 50.75, 39)


def relative_positions(residue_index: np.ndarray) -> np.ndarray:
    """Class 0 to 64 of every pair, int32 [N, N]: f_i - f_j clipped at 32, plus 32.

    Source: Jumper et al. 2021, supplementary Algorithm 4.
    """
    offset = residue_index[:, None] - residue_index[None, :]
    return (np.clip(offset, -MAX_OFFSET, MAX_OFFSET) + MAX_OFFSET).astype(np.int32)


def distances(c_beta: np.ndarray) -> np.ndarray:
    """Distance in angstrom of every two C-betas, [N, N]; NaN where either has no coordinates."""
    return np.linalg.norm(c_beta[:, None] - c_beta[None, :], axis=-1)


def distogram(distance: np.ndarray) -> np.ndarray:
    """The 39 one-hot distance bins and whether the distance is known, float32 [N, N, 40].

    A distance up to 3.25 angstrom falls in no bin; an unknown one is zeros throughout.

    Source: Jumper et al. 2021, supplementary Table 2, template_distogram and the pseudo C-beta
    mask that goes with it.
    """
    known = np.isfinite(distance)
    bins = np.searchsorted(DISTANCE_BINS, np.where(known, distance, 0.0)) - 1
    one_hot = bins[..., None] == np.arange(len(DISTANCE_BINS))
    return np.concatenate([one_hot, known[..., None]], axis=-1).astype(np.float32)


def embed(protein: Protein, key: jax.Array, c_z: int) -> jax.Array:
    """The pair representation of `protein`, float32 [N, N, c_z].

    z_ij = a_i + b_j + p_ij, with a and b linear in the residue type and p in the relative
    position; for a structure also a linear of the distogram.

    Source: Jumper et al. 2021, supplementary Algorithms 3 and 4.
    """
    left, right, position, template = jax.random.split(key, 4)
    types = jax.nn.one_hot(protein.residue_types, len(RESIDUE_TYPES))
    relative = jax.nn.one_hot(relative_positions(protein.residue_index), 2 * MAX_OFFSET + 1)
    z = _linear(left, types, c_z)[:, None] + _linear(right, types, c_z)[None, :]
    z = z + _linear(position, relative, c_z)
    if protein.c_beta is not None:
        z = z + _linear(template, jnp.asarray(distogram(distances(protein.c_beta))), c_z)
    return z


def _linear(key: jax.Array, one_hot: jax.Array, channels: int) -> jax.Array:
    """A random linear layer with bias; weights of unit size, as one input in all is 1."""
    kernel_key, bias_key = jax.random.split(key)
    kernel = jax.random.normal(kernel_key, (one_hot.shape[-1], channels))
    bias = 0.1 * jax.random.normal(bias_key, (channels,))
    return jnp.matmul(one_hot, kernel, precision="highest") + bias
