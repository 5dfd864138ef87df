"""Continuations of prompts, token by token: of many together on one rank, of one after the other on many."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lasp.evaluation.prompts.prompt import Prompt
from lasp.evaluation.subject import Subject
from lasp.models import Decoder, Memory, Rows
from lasp.training.generate import PREFILL_TOKENS

Take = Callable[[int, int], bool]
"""Gets a prompt's number and the next token of its continuation; says whether to go on with it."""


def answer(subject: Subject, prompt: Prompt) -> str:
    """What the model writes after the prompt, taking the likeliest token every time, until it has said all answers,
    ended the document or used the prompt's room."""
    tokenizer, written, text = subject.tokenizer, list[int](), ""

    def take(_: int, token: int) -> bool:
        nonlocal text
        if token == tokenizer.eod:
            return False
        written.append(token)
        text = tokenizer.decode(written)
        return len(written) < prompt.room and prompt.score(text) < 1.0

    write_greedily(subject, [prompt.ids], take, guess=prompt.expected)
    return text


def write_greedily(
    subject: Subject, prompts: Sequence[np.ndarray], take: Take, guess: np.ndarray | None = None
) -> None:
    """Continues the prompts, each [tokens] with at least one, by their likeliest tokens, as long as `take` says.

    guess: how continuations may begin; on many ranks a right one saves time.
    """
    if subject.sp.size == 1:
        write(subject.model, prompts, take, lambda logits: logits.argmax(-1))
        return
    for number, ids in enumerate(prompts):
        _write_anew(subject, ids, partial(take, number), guess)


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


def _write_anew(subject: Subject, ids: np.ndarray, take: Callable[[int], bool], guess: np.ndarray | None) -> None:
    """On many ranks, none of which holds the whole memory, everything is read anew for what comes next.

    As long as the guess is what the model writes, one pass gives many tokens.
    """
    known, guessed = ids, np.array([], np.int64) if guess is None else guess
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
