"""What an option says in one word: a corpus and its weight, a stage of a curriculum."""

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated

from lasp.fields import Allowed, require

_WEIGHT = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")
_STAGE = re.compile(r"([1-9]\d{0,8}):([1-9]\d{0,8})")
Stage = Annotated[str, Allowed("LENGTH:STEPS, as 4096:1000", lambda stage: _STAGE.fullmatch(stage) is not None)]


def read_corpora(field: str, named: str | Iterable[str]) -> dict[str, Fraction | None]:
    """The corpora of the form PREFIX or PREFIX:WEIGHT, with their weights.

    Raises ValueError if one is named twice, if some have a weight and some have none, or if a weight is 0.
    """
    corpora: dict[str, Fraction | None] = {}
    words = (named,) if isinstance(named, str) else tuple(named)
    require(bool(words), field, words, "at least one corpus")
    for word in words:
        match = _WEIGHT.fullmatch(word)
        prefix, weight = (word, None) if match is None else (match[1], Fraction(match[2]))
        require(prefix not in corpora, field, word, "each corpus once")
        require(weight != 0, field, word, "a weight above 0")
        corpora[prefix] = weight
    without = [prefix for prefix, weight in corpora.items() if weight is None]
    require(len(without) in (0, len(corpora)), field, " ".join(words), "a weight for all corpora, or for none")
    return corpora


def read_stage(stage: str) -> tuple[int, int]:
    """(tokens of a context, steps) of a Stage."""
    match = _STAGE.fullmatch(stage)
    assert match is not None, "checked by its annotation"
    return int(match[1]), int(match[2])
