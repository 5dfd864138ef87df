"""Sequences in pieces, with a memory between them, are the sequences in one."""

import pytest
import torch

from lasp.models import Memory
from lasp.parallel import SequenceParallel
from tests.models.helpers import MODELS, assert_same, decoder, gradients, random_tokens, sequence

every_model = pytest.mark.parametrize(("mixer", "pattern"), MODELS)


@every_model
@pytest.mark.parametrize("pieces", [[17, 1, 1, 1, 5], [1] * 9, [2, 90]])
def test_prefill_and_decoding_give_the_logits_of_one_pass(mixer, pattern, pieces):
    model, tokens, memory = decoder(mixer, pattern), random_tokens(2, sum(pieces)), Memory()
    with torch.no_grad():
        expected = model(tokens, sequence(sum(pieces)))
        logits = [model(piece, sequence(piece.shape[1]), memory=memory) for piece in tokens.split(pieces, dim=1)]
        forgetful = model(tokens[:, -1:], sequence(1))
    assert memory.tokens == sum(pieces)
    assert (torch.cat(logits, dim=1) - expected).abs().max() <= 1e-10
    assert (forgetful - expected[:, -1:]).abs().max() > 1e-3  # what came before matters


@every_model
def test_gradients_flow_through_the_memory(mixer, pattern):
    model, tokens, labels, memory = decoder(mixer, pattern), random_tokens(1, 30), random_tokens(1, 30), Memory()
    losses = [
        model(tokens[:, part], sequence(part.stop - part.start), labels=labels[:, part], memory=memory)[0]
        for part in (slice(0, 11), slice(11, 13), slice(13, 30))
    ]
    whole, _ = model(tokens, sequence(30), labels=labels)
    assert_same(gradients(model, sum(losses[1:], losses[0])), gradients(model, whole))


@pytest.mark.parametrize("mixer", ["gla", "mamba2", "kda"])
def test_linear_layers_remember_in_constant_space(mixer):
    model, memory = decoder(mixer, "L"), Memory()

    def held() -> int:
        return sum(x.untyped_storage().nbytes() for slots in memory.slots.values() for x in slots)

    with torch.no_grad():
        model(random_tokens(1, 3), sequence(3), memory=memory)
        after_prompt = held()
        model(random_tokens(1, 200), sequence(200), memory=memory)
    assert held() == after_prompt > 0


def test_only_whole_sequences_of_one_rank_are_remembered():
    model = decoder("linear", "L")
    packed = sequence(12, torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match="seq: got part of a sequence, padding or packed"):
        model(random_tokens(1, 12), packed, memory=Memory())
    padded = SequenceParallel(None, layout="zigzag").sequence(13)
    with pytest.raises(ValueError, match="seq: got part of a sequence, padding or packed"):
        model(random_tokens(1, 14), padded, memory=Memory())
