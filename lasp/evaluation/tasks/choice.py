"""Draws without replacement, for many rows at once."""

import numpy as np


def distinct(rng: np.random.Generator, weights: np.ndarray, rows: int, count: int) -> np.ndarray:
    """[rows, count] different indices of `weights`, drawn one after the other with probabilities in their proportion.

    By exponential clocks: index i rings after a time of mean 1 / weight, and the first `count` that ring are taken.
    """
    times = rng.standard_exponential((rows, len(weights)), dtype=np.float32) / weights.astype(np.float32)
    first = np.argpartition(times, min(count, len(weights) - 1), axis=1)[:, :count]
    return np.take_along_axis(first, np.argsort(np.take_along_axis(times, first, 1), 1), 1)


def distinct_uniform(rng: np.random.Generator, size: int, rows: int, count: int) -> np.ndarray:
    """The same for `size` equal weights: rows are drawn with replacement until nothing in them is twice."""
    if count**2 > 2 * size:  # which would be seldom
        return distinct(rng, np.ones(size), rows, count)
    drawn = rng.integers(size, size=(rows, count))
    again = np.arange(rows)
    while len(again) > 0:
        ordered = np.sort(drawn[again], axis=1)
        again = again[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
        drawn[again] = rng.integers(size, size=(len(again), count))
    return drawn
