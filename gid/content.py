"""Content features of items: TF-IDF of their tokens, and its leading singular vectors."""

import numpy as np
import scipy.sparse as sp

from contract.schema import Ragged

POWER_STEPS = 3
OVERSAMPLED = 16  # columns beside those asked for


def tfidf(tokens: Ragged) -> sp.csr_array:
    """TF-IDF of items 1..I, (I, V), rows of norm 1, or 0 where there is no content.

    Args:
        tokens: content token ids of item_idx 0..I; row 0 is padding.
    """
    num_items = len(tokens) - 1
    vocabulary = int(tokens.values.max(initial=0)) + 1
    parts = np.ones(len(tokens.values)), tokens.values, tokens.offsets[1:]
    matrix = sp.csr_array(parts, (num_items, vocabulary), copy=True)  # the next line works in place
    matrix.sum_duplicates()
    document_frequency = np.bincount(matrix.indices, minlength=vocabulary)
    matrix.data = (1 + np.log(matrix.data)) * np.log((1 + num_items) / (1 + document_frequency))[matrix.indices]
    norms = np.sqrt(matrix.power(2).sum(axis=1))
    return sp.diags_array(1 / np.where(norms > 0, norms, 1)) @ matrix


def features(tokens: Ragged, dim: int, seed: int) -> np.ndarray:
    """TF-IDF in its `dim` leading singular directions, float32 (I, dim); zeros for items without content.

    By a randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4). Fewer tokens than `dim` leave
    columns of zeros.
    """
    matrix = tfidf(tokens)
    width = min(dim + OVERSAMPLED, *matrix.shape)
    basis = np.random.default_rng(seed).normal(size=(matrix.shape[1], width))
    for _ in range(POWER_STEPS):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    # The Gram matrix in the basis holds the squared singular values; it is small.
    image = matrix @ basis
    directions = np.linalg.eigh(image.T @ image)[1][:, ::-1][:, :dim]
    found = np.zeros((matrix.shape[0], dim), np.float32)
    found[:, : directions.shape[1]] = image @ directions
    return found


def whitened(x: np.ndarray) -> np.ndarray:
    """Centred and turned so that the covariance is I / d, float32 (n, d): every block weighs the same.

    Directions of less than a thousandth of the largest variance are not blown up to the size of the others.
    """
    centred = x - x.mean(axis=0, dtype=np.float64)
    variance, directions = np.linalg.eigh(centred.T @ centred / len(x))
    floor = max(float(variance[-1]) * 1e-3, np.finfo(np.float64).tiny)
    return (centred @ (directions / np.sqrt(np.maximum(variance, floor) * x.shape[1]))).astype(np.float32)
