"""Continuations of prompts, token by token: of many together on one rank, of one after the other on many."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lasp.evaluation.prompts.prompt import Prompt
from lasp.evaluation.subject import Subject
from lasp.models import Decoder, Memory, Rows
from lasp.training.generate import PREFILL_TOKENS

TOGETHER = 65_536  # tokens of prompts, up to which several are read at a time
Take = Callable[[int, int], bool]
"""Gets a prompt's number and the next token of its continuation; says whether to go on with it."""


def answers(subject: Subject, prompts: Sequence[Prompt]) -> list[str]:
    """What the model writes after each prompt, taking the likeliest token every time, until it has said all answers,
    ended the document or used the prompt's room."""
    return [text for some in _together(prompts) for text in _answers(subject, some)]


def _together(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """Prompts that are read together: one at least, of up to TOGETHER tokens."""
    first, tokens = 0, 0
    for number, prompt in enumerate(prompts):
        tokens += len(prompt.ids)
        if number > first and tokens > TOGETHER:
            yield prompts[first:number]
            first, tokens = number, len(prompt.ids)
    if prompts:
        yield prompts[first:]


def _answers(subject: Subject, prompts: Sequence[Prompt]) -> list[str]:
    tokenizer, written, texts = subject.tokenizer, [list[int]() for _ in prompts], [""] * len(prompts)

    def take(number: int, token: int) -> bool:
        if token == tokenizer.eod:
            return False
        written[number].append(token)
        texts[number] = tokenizer.decode(written[number])
        prompt = prompts[number]
        return len(written[number]) < prompt.room and prompt.score(texts[number]) < 1.0

    guesses = [prompt.expected for prompt in prompts]
    write_greedily(subject, [prompt.ids for prompt in prompts], take, guesses)
    return texts


def write_greedily(
    subject: Subject, prompts: Sequence[np.ndarray], take: Take, guesses: Sequence[np.ndarray] | None = None
) -> None:
    """Continues the prompts, each [tokens] with at least one, by their likeliest tokens, as long as `take` says.

    guesses: how continuations may begin; on many ranks right ones save time.
    """
    if subject.sp.size == 1:
        write(subject.model, prompts, take, lambda logits: logits.argmax(-1))
        return
    for number, ids in enumerate(prompts):
        _write_anew(subject, ids, partial(take, number), np.array([], np.int64) if guesses is None else guesses[number])


@torch.inference_mode()
def write(model: Decoder, prompts: Sequence[np.ndarray], take: Take, choose: Callable[[Tensor], Tensor]) -> None:
    """Continues prompts of any lengths together, on one rank; every token is read once, and there is no padding.

    choose: from logits [rows, vocabulary] a token [rows] for each.
    """
    memory, device = Memory(), model.embedding.weight.device
    numbers, new = list(range(len(prompts))), [torch.from_numpy(ids).to(device, torch.int64) for ids in prompts]
    while numbers:
        tokens = choose(model.logits(_read(model, memory, new)))
        going_on = [row for row, token in enumerate(tokens.tolist()) if take(numbers[row], token)]
        if len(going_on) < len(numbers):
            memory.select(torch.tensor(going_on, dtype=torch.int64, device=device))
        numbers, new = [numbers[row] for row in going_on], [tokens[row, None] for row in going_on]


def _read(model: Decoder, memory: Memory, new: list[Tensor]) -> Tensor:
    """What the head takes at the last of each row's new tokens, [rows, hidden]; PREFILL_TOKENS of a row at a time."""
    last = torch.empty(len(new), model.config.hidden_size, device=new[0].device, dtype=model.embedding.weight.dtype)
    for start in range(0, max(map(len, new)), PREFILL_TOKENS):
        parts = [ids[start : start + PREFILL_TOKENS] for ids in new]
        rows = Rows([len(part) for part in parts], last.device)
        x, _ = model.hidden_states(model.embedding(torch.cat(parts)[None]), rows, memory=memory)
        filled = [row for row, length in enumerate(rows.lengths) if length]
        last[filled] = x[0, rows.offsets[1:][filled] - 1]
    return last


def _write_anew(subject: Subject, ids: np.ndarray, take: Callable[[int], bool], guess: np.ndarray) -> None:
    """On many ranks, none of which holds the whole memory, everything is read anew for what comes next.

    As long as the guess is what the model writes, one pass gives many tokens.
    """
    known, guessed = ids, guess
    while True:
        likeliest = _likeliest(subject, np.concatenate([known, guessed]), len(known) - 1)
        wrong = np.flatnonzero(likeliest[:-1] != guessed)
        new = likeliest[: 1 + (wrong[0] if len(wrong) else len(guessed))]
        if not all(take(token) for token in new.tolist()):
            return
        known, guessed = np.concatenate([known, new]), guessed[:0]


@torch.inference_mode()
def _likeliest(subject: Subject, ids: np.ndarray, first: int) -> np.ndarray:
    """The likeliest tokens after each of ids[first:], on every rank."""
    seq, model, device = subject.sp.sequence(len(ids)), subject.model, subject.world.device
    tokens = seq.shard(torch.from_numpy(ids).to(device), dim=0)
    places = seq.shard(torch.arange(1, len(ids) + 1, device=device), dim=0)  # 0 is padding
    x, _ = model.hidden_states(model.embedding(tokens[None]), seq)
    mine = places > first
    found = torch.zeros(len(ids) - first, dtype=torch.int64, device=device)
    found[places[mine] - 1 - first] = model.logits(x[0, mine]).argmax(-1)
    return seq.sum(found).cpu().numpy()
