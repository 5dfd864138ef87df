"""Sequences in pieces, with a memory between them, are the sequences in one."""

import pytest
import torch

from lasp.models import Memory, Rows
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
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_flow_through_the_memory(mixer, pattern, recompute):
    model, tokens, labels, memory = decoder(mixer, pattern), random_tokens(1, 30), random_tokens(1, 30), Memory()
    model.checkpoint_layers = recompute
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


@pytest.mark.parametrize("mixer", ["log_linear_mamba2", "log_linear_gated_delta_net"])
def test_log_linear_layers_remember_a_state_for_each_power_of_two(mixer):
    model, memory = decoder(mixer, "L"), Memory()
    with torch.no_grad():
        for tokens in (100, 1, 26):
            model(random_tokens(1, tokens), sequence(tokens), memory=memory)
    for _, state in memory.slots.values():  # behind the convolution's
        assert state.tokens.tolist() == [127] and state.slots.shape[1] == 7


def test_only_whole_sequences_of_one_rank_are_remembered():
    model = decoder("linear", "L")
    packed = sequence(12, torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match="seq: got part of a sequence, padding or packed"):
        model(random_tokens(1, 12), packed, memory=Memory())
    padded = SequenceParallel(None, layout="zigzag").sequence(13)
    with pytest.raises(ValueError, match="seq: got part of a sequence, padding or packed"):
        model(random_tokens(1, 14), padded, memory=Memory())


@every_model
def test_rows_of_unequal_length_are_remembered_each_for_itself(mixer, pattern):
    """Two rounds of new tokens, none of them in one row, then single tokens; and rows change places in between."""
    model, memory = decoder(mixer, pattern), Memory()
    texts = [random_tokens(1, length) for length in (9, 23, 4)]
    rounds = [[2, 17, 3], [5, 4, 0]]
    with torch.no_grad():
        expected = [model(text, sequence(text.shape[1])) for text in texts]
        got: list[list[torch.Tensor]] = [[], [], []]
        done = [0, 0, 0]
        for lengths in rounds:
            parts = [text[:, at : at + n] for text, at, n in zip(texts, done, lengths, strict=True)]
            x = model.embedding(torch.cat(parts, dim=1))
            hidden, _ = model.hidden_states(x, Rows(lengths, x.device), memory=memory)
            for row, logits in enumerate(model.logits(hidden).split(lengths, dim=1)):
                got[row].append(logits)
            done = [at + n for at, n in zip(done, lengths, strict=True)]
        assert memory.tokens.tolist() == done == [7, 21, 3]
        memory.select(torch.tensor([2, 1, 0, 1]))
        assert memory.tokens.tolist() == [3, 21, 7, 21]
        token = torch.cat([texts[row][:, done[row] : done[row] + 1] for row in (2, 1, 0, 1)])
        last = model(token, sequence(1), memory=memory)
    for row, place in ((0, 2), (1, 1), (2, 0)):
        logits = torch.cat([*got[row], last[place : place + 1]], dim=1)
        assert (logits - expected[row][:, : done[row] + 1]).abs().max() <= 1e-10
    assert torch.equal(last[1], last[3])
