"""Log-likelihoods and continuations of texts of unequal lengths: in batches as alone, and as plain logits say."""

import numpy as np
import pytest
import torch

from lasp.evaluation.likelihood import log_likelihoods
from lasp.evaluation.writing import write
from lasp.parallel import SequenceParallel


def logits(subject, ids):
    return subject.model(torch.tensor(ids)[None], SequenceParallel(None).sequence(len(ids)))[0]


@pytest.fixture
def texts():
    draw = torch.randint
    return [draw(0, 257, (length,)).tolist() for length in (9, 1, 30, 4, 17)]


@torch.no_grad()
def test_log_likelihoods_are_those_of_each_text_alone(subject, texts):
    pairs = [(texts[0], texts[1]), (texts[1], texts[2]), (texts[3], texts[4])]
    best = logits(subject, texts[2]).argmax(-1)[-1].item()
    pairs.append((texts[2], [best]))
    for (context, continuation), found in zip(pairs, log_likelihoods(subject, pairs), strict=True):
        scores = logits(subject, context + continuation).log_softmax(-1)[len(context) - 1 : -1]
        expected = scores.gather(-1, torch.tensor(continuation)[:, None]).sum().item()
        assert found[0] == pytest.approx(expected, rel=1e-10)
        assert found[1] == (scores.argmax(-1).tolist() == continuation)
    assert found[1]
    assert log_likelihoods(subject, pairs[1:2]) == [pytest.approx(log_likelihoods(subject, pairs)[1], rel=1e-10)]


def test_ids_that_the_model_does_not_know_are_refused(subject):
    with pytest.raises(ValueError, match=r"tokens: got 300, expected 0 to 256"):
        log_likelihoods(subject, [([1], [300])])


@torch.no_grad()
@pytest.mark.parametrize("piece", [3, 4096])
def test_continuations_are_those_of_each_prompt_alone(subject, texts, monkeypatch, piece):
    """Prompts of unequal lengths, read in pieces, whose continuations end at different times."""
    monkeypatch.setattr("lasp.evaluation.writing.PREFILL_TOKENS", piece)
    written = [[] for _ in texts]
    rooms = [4, 1, 6, 2, 6]

    def take(row, token):
        written[row].append(token)
        return len(written[row]) < rooms[row]

    write(subject.model, [np.array(ids) for ids in texts], take, lambda logits: logits.argmax(-1))
    for ids, got, room in zip(texts, written, rooms, strict=True):
        expected = list(ids)
        for _ in range(room):
            expected.append(logits(subject, expected)[-1].argmax().item())
        assert got == expected[len(ids) :]
