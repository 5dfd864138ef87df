"""Words, numbers and codes that the texts are about, drawn from a seed."""

import uuid

import numpy as np

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]


def invented(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables, of which there are 343,000."""
    numbers = rng.choice(len(SYLLABLES) ** 3, size=count, replace=False)
    base = len(SYLLABLES)
    return [SYLLABLES[n // base**2] + SYLLABLES[n // base % base] + SYLLABLES[n % base] for n in numbers.tolist()]


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Different ones of seven digits."""
    return [str(10**6 + n) for n in rng.choice(9 * 10**6, size=count, replace=False).tolist()]


def codes(rng: np.random.Generator, count: int) -> list[str]:
    """Random UUIDs."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


WORDS = {"word": invented, "number": numbers, "uuid": codes}
