"""Greedy continuations of long prompts, on one rank or many."""

from collections.abc import Iterator

import numpy as np
import torch

from lasp.evaluation.prompts.prompt import Prompt
from lasp.evaluation.subject import Subject
from lasp.models import Memory
from lasp.training.generate import advance


def answer(subject: Subject, prompt: Prompt) -> str:
    """What the model writes after the prompt, taking the likeliest token every time, until it has said all answers,
    ended the document or used the prompt's room."""
    tokenizer = subject.tokenizer
    written: list[int] = []
    text = ""
    for token in _tokens(subject, prompt):
        if token == tokenizer.eod:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if len(written) == prompt.room or prompt.score(text) == 1.0:
            break
    return text


def _tokens(subject: Subject, prompt: Prompt) -> Iterator[int]:
    return (_remembering if subject.sp.size == 1 else _anew)(subject, prompt)


def _remembering(subject: Subject, prompt: Prompt) -> Iterator[int]:
    """One rank reads each token once."""
    memory, incoming = Memory(), torch.from_numpy(prompt.ids).to(subject.world.device)
    while True:
        incoming = advance(subject.model, incoming, memory).argmax(keepdim=True)
        yield int(incoming)


def _anew(subject: Subject, prompt: Prompt) -> Iterator[int]:
    """Many ranks, none of which holds the whole memory, read everything anew, with a guess of what comes.

    As long as the guess, the expected answer at first, is what the model writes, one pass gives many tokens.
    """
    known, guess = prompt.ids, prompt.expected.astype(np.int64)
    while True:
        likeliest = _likeliest(subject, np.concatenate([known, guess]), len(known) - 1)
        wrong = np.flatnonzero(likeliest[:-1] != guess)
        new = likeliest[: 1 + (wrong[0] if len(wrong) else len(guess))]
        yield from new.tolist()
        known, guess = np.concatenate([known, new]), guess[:0]


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
