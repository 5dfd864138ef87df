"""Several corpora as one stream of contexts, which come from each in proportion to its weight.

The stream is made of turns, `context_length` tokens of one corpus each. Whose a turn is depends on its number and the
weights alone, and what it holds on how many turns its corpus has had: two integers are all that a run has to keep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from lasp.data.packed import Context, PackedContexts


@dataclass(frozen=True)
class Numbered:
    """A context: number `number` of those of its length in its corpus. corpus: None if there is only one."""

    corpus: str | None
    number: int
    context: Context


def whose_turn(number: int, weights: Sequence[Fraction]) -> int:
    """Which of the weights has turn number 0, 1, 2, …; each has its part of any first turns, give or take a few.

    The first has every turn at which its share of the turns so far reaches the next integer; of those that are left the
    second has its part in the same way, and so on.
    """
    left = sum(weights, Fraction(0))
    for index, weight in enumerate(weights):
        before, after = (int(turns * weight / left) for turns in (number, number + 1))
        if after > before:
            return index
        number -= before
        left -= weight
    raise AssertionError("the last weight takes all turns that are left")


def mixed_fingerprint(weights: Sequence[Fraction], known: Sequence[str]) -> str:
    """That of corpora with these fingerprints; the weights are their parts of a whole."""
    if len(known) == 1:
        return known[0]
    whole = sum(weights)
    return "; ".join(f"{weight / whole} of {each}" for weight, each in zip(weights, known, strict=True))


class Mixture:
    """The contexts of some corpora, from the first ones on, by turns. corpora: their prefixes and weights; with None,
    as many turns as there are tokens. Raises what `PackedContexts` raises, which the options are those of."""

    def __init__(
        self,
        corpora: Mapping[str, Fraction | None],
        context_length: int,
        *,
        seed: int,
        vocab_size: int | None = None,
        shuffle_contexts: bool = False,
    ) -> None:
        self.context_length, self.shuffle_contexts = context_length, shuffle_contexts
        self.corpora = {
            prefix: PackedContexts(prefix, context_length, seed=seed, vocab_size=vocab_size) for prefix in corpora
        }
        sizes = {prefix: Fraction(contexts.file.num_tokens) for prefix, contexts in self.corpora.items()}
        self.weights = [weight or sizes[prefix] for prefix, weight in corpora.items()]
        self.known = {prefix: contexts.file.fingerprint(vocab_size) for prefix, contexts in self.corpora.items()}
        self.turns, self.turns_of = 0, dict.fromkeys(self.corpora, 0)
        if len(set(self.known.values())) < len(self.known):
            raise ValueError(f"data.train: got {list(self.known)}, expected no corpus twice, under whatever name")

    @property
    def fingerprint(self) -> str:
        """What tells the stream from others: the corpora, and their weights if there are several."""
        return mixed_fingerprint(self.weights, list(self.known.values()))

    @property
    def tokens(self) -> int:
        """How many the turns so far have had."""
        return self.turns * self.context_length

    @property
    def positions(self) -> dict[str, int]:
        """How many of them in each corpus, by its fingerprint."""
        return {self.known[prefix]: turns * self.context_length for prefix, turns in self.turns_of.items()}

    def go_on(self, tokens: int, positions: Mapping[str, int]) -> None:
        """Begins where a stream was after so many tokens with these positions: after the last turn that it began.

        One corpus goes on in the place of one other. Of several, those that were not in the stream begin anew.
        """
        self.turns = ceil(tokens / self.context_length)
        for prefix, known in self.known.items():
            position = tokens if len(self.known) == len(positions) == 1 else positions.get(known, 0)
            self.turns_of[prefix] = ceil(position / self.context_length)

    def take(self, turns: int, length: int | None = None) -> list[Numbered]:
        """The contexts of the next turns, whole, or in contexts of `length`, of which a turn has several."""
        length = length or self.context_length
        parts = self.context_length // length
        taken = []
        for turn in range(self.turns, self.turns + turns):
            prefix = list(self.corpora)[whose_turn(turn, self.weights)]
            first = self.turns_of[prefix] * parts
            name = prefix if len(self.corpora) > 1 else None
            taken += [
                Numbered(name, number, self._context(prefix, number, length)) for number in range(first, first + parts)
            ]
            self.turns_of[prefix] += 1
        self.turns += turns
        return taken

    def _context(self, prefix: str, number: int, length: int) -> Context:
        corpus = self.corpora[prefix]
        return corpus.shuffled(number, length) if self.shuffle_contexts else corpus.at(number * length, length)
