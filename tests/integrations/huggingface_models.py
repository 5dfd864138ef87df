"""Small decoders as Transformers' models."""

from dataclasses import replace

import torch

from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel


def tokens_of(gen, batch, length, vocabulary=64):
    return torch.randint(0, vocabulary, (batch, length), generator=gen)


def logits_of(decoder, tokens):
    with torch.no_grad():
        return decoder(tokens, SequenceParallel(None).sequence(tokens.shape[1]))


def new_decoder(gen, mixer="gated_delta_net", pattern="LLLN", **changes):
    decoder = Decoder(replace(tiny(mixer, pattern), **changes))
    with torch.no_grad():  # norms, too, which begin as ones
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=gen) / 20)
    return decoder


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def padded(texts, length, side="left", garbage=63):
    """Texts [1, n] as rows of `length` columns, and the mask."""
    ids = torch.full((len(texts), length), garbage)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        places = slice(length - text.shape[1], None) if side == "left" else slice(0, text.shape[1])
        ids[row, places], mask[row, places] = text[0], 1
    return ids, mask
