"""Draws without replacement, for many rows at once."""

import numpy as np


def distinct(rng: np.random.Generator, weights: np.ndarray, rows: int, count: int) -> np.ndarray:
    """[rows, count] different indices of `weights`, drawn one after the other with probabilities in their proportion.

    By exponential clocks: index i rings after a time of mean 1 / weight, and the first `count` that ring are taken.
    """
    times = rng.standard_exponential((rows, len(weights)), dtype=np.float32) / weights.astype(np.float32)
    first = np.argpartition(times, min(count, len(weights) - 1), axis=1)[:, :count]
    return np.take_along_axis(first, np.argsort(np.take_along_axis(times, first, 1), 1), 1)
