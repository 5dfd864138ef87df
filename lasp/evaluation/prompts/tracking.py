"""Variable tracking: names that are assigned to each other in a long text. RULER, arXiv:2404.06654 §3."""

from dataclasses import dataclass

import numpy as np

from lasp.evaluation.prompts.prompt import NOISE, Composer, Haystack, Prompt, endless
from lasp.evaluation.prompts.words import invented


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """A variable gets a number, another one gets the first, and so on for `hops`, in this order anywhere in noise; all
    variables with the number are asked for."""

    hops: int = 4

    def prompt(self, composer: Composer, haystack: Haystack, length: int, rng: np.random.Generator) -> Prompt:
        names = [name.upper() for name in invented(rng, self.hops + 1)]
        number = str(rng.integers(10_000, 100_000))
        sources = [number, *(f"VAR {name}" for name in names[:-1])]
        lines = [f" VAR {name} = {source}." for name, source in zip(names, sources, strict=True)]
        sentences = endless(Haystack(NOISE).sentences)
        told = f"variables with the value {number}"
        return composer.compose(
            length,
            intro="This text assigns values to variables. Remember them.\n",
            fill=lambda tokens: composer.fitting(sentences, tokens),
            needles=list(zip(sorted(rng.random(len(lines)).tolist()), lines, strict=True)),
            question=f"\nWhich are all the {told}, whether assigned or through another variable? The {told} are:",
            answers=names,
        )
