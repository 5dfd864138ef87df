"""A stream of segments over several ranks gives one rank's loss and gradients on the whole sequence, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lasp.config import MIXERS
from lasp.models import Decoder
from lasp.parallel import SequenceParallel, Stream
from lasp.training.streaming import StreamedBatch
from tests.parallel import test_model as whole_models
from tests.parallel.inputs import error

TOLERANCE = 1e-10
TOKENS = 53
DOCUMENTS = (0, 3, 3, 20, 48, 53)
MIXTURE = {"num_experts": 4, "expert_intermediate_size": 12, "aux_loss_weight": 0.5, "z_loss_weight": 0.1}


def build(mixer: str, **changes) -> Decoder:
    """The same weights on every rank and in every call."""
    torch.manual_seed(0)
    model = Decoder(replace(whole_models.config(mixer), **changes)).double()
    numbers = torch.Generator(torch.get_default_device()).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=numbers)
    return model


def gradients(model: Decoder, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Summed over the ranks."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.grad.clone()
        if group is not None:
            dist.all_reduce(found[name], group=group)
    return found


def expected(model: Decoder, tokens, labels, offsets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of one rank without segments, and its gradients."""
    seq = SequenceParallel(None).sequence(tokens.shape[1], offsets)
    loss = seq.mean(*model(tokens, seq, labels=labels))
    loss.backward()
    return loss.detach(), gradients(model, None)


def check(gen, group, make, documents=None, segment_tokens=17, recompute=False, batch=1, **options) -> None:
    tokens, labels = (torch.randint(31, (batch, TOKENS), generator=gen) for _ in range(2))
    labels = labels.masked_fill(torch.rand(labels.shape, generator=gen) < 0.1, -100)
    offsets = None if documents is None else torch.tensor(documents)
    wanted, wanted_gradients = expected(make(), tokens, labels, offsets)

    model = make()
    model.checkpoint_layers = recompute
    stream = Stream(SequenceParallel(group, **options), TOKENS, segment_tokens, offsets)
    count = int((labels != -100).sum())
    total = StreamedBatch.of(stream, tokens, labels).backward(model, count)
    dist.all_reduce(total, group=group)
    assert error(total / count, wanted) <= TOLERANCE
    for name, got in gradients(model, group).items():
        assert error(got, wanted_gradients[name]) <= TOLERANCE, name


WAYS = {
    "contiguous": {"layout": "contiguous", "state_exchange": "ring", "softmax": "all_gather", "recompute": True},
    "zigzag": {"layout": "zigzag", "state_exchange": "all_gather", "softmax": "ring"},
}


@pytest.mark.mpi
@pytest.mark.parametrize("documents", [None, pytest.param(DOCUMENTS, id="packed")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_stream_trains_as_one_rank_does_on_the_whole(gen, group, mixer, way, documents):
    check(gen, group, lambda: build(mixer), documents, **WAYS[way])
