"""What evaluations read: of each held-out corpus the first contexts, in its file's order."""

import os
from dataclasses import dataclass
from fractions import Fraction

from lasp.config import TrainConfig, require
from lasp.data import Context, PackedContexts, mixed_fingerprint

USUAL = 8  # contexts


@dataclass(frozen=True)
class HeldOut:
    """A corpus. name: as metrics call it, None if there is only one. weight: of its loss in the mean of all."""

    name: str | None
    weight: Fraction
    contexts: list[Context]


def open_held_out(config: TrainConfig, groups: int) -> tuple[list[HeldOut], str]:
    """The corpora of a run of so many data-parallel groups, and what tells them from others.

    Without weights each weighs as much as it has tokens. Raises ValueError for one that has too few contexts, or no
    label in them, and what `PackedContexts` raises.
    """
    corpora = config.data.held_out_corpora
    held_out, known = [], []
    for name, (prefix, weight) in zip(_names(list(corpora)), corpora.items(), strict=True):
        vocab_size = config.model.vocab_size
        opened = PackedContexts(prefix, config.context_length, seed=config.seed, shuffle=False, vocab_size=vocab_size)
        count = how_many(config.data.eval_contexts, opened, groups)
        contexts = [opened[i] for i in range(count)]
        labelled = any(context.count_labels() for context in contexts)
        require(labelled, "eval_contexts", count, f"more: the first {count} contexts of {prefix} have no label")
        held_out.append(HeldOut(name, weight or Fraction(opened.file.num_tokens), contexts))
        known.append(opened.file.fingerprint(vocab_size))
    return held_out, mixed_fingerprint([each.weight for each in held_out], known)


def how_many(wanted: int | None, corpus: PackedContexts, groups: int = 1) -> int:
    """How many of a corpus's contexts evaluations read, as many in each group. If the number was left open, the usual
    one, or fewer if there are not so many. Raises ValueError if there are too few."""
    there = corpus.num_contexts
    count = min(max(USUAL, groups), there) // groups * groups if wanted is None else wanted
    path = corpus.file.prefix
    require(count > 0, "data.valid", f"{there} contexts in {path}", f"{groups}, one for each data-parallel group")
    require(count <= there, "eval_contexts", count, f"at most {there}, the contexts that {path} holds")
    return count


def as_values(held_out: list[HeldOut], losses: list[float]) -> dict[str, float]:
    """What metrics call the corpora's losses: `valid_loss` their mean by weight, and each by its name if several."""
    mean = sum(float(each.weight) * loss for each, loss in zip(held_out, losses, strict=True))
    values = {"valid_loss": mean / float(sum(each.weight for each in held_out))}
    if len(held_out) == 1:
        return {"valid_loss": losses[0]}
    return values | {f"valid_loss/{each.name}": loss for each, loss in zip(held_out, losses, strict=True)}


def told_in_words(values: dict[str, float]) -> str:
    """The same in a line."""
    of_each = ", ".join(f"{name.partition('/')[2]} {loss:.4f}" for name, loss in values.items() if "/" in name)
    return f"held-out loss {values['valid_loss']:.4f}" + (f" ({of_each})" if of_each else "")


def _names(prefixes: list[str]) -> list[str | None]:
    """The last parts of the paths where they differ, else all of each; none for one alone."""
    if len(prefixes) == 1:
        return [None]
    short = [os.path.basename(prefix) for prefix in prefixes]
    return [*(short if len(set(short)) == len(short) else prefixes)]
