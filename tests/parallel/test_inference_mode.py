"""Nothing that is kept was made for inference alone: a validation pass may come before the first step of training."""

import gc
import time
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import attention, linear_attention
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from tests.parallel.inputs import error
from tests.patience import PATIENCE

TOKENS = 23  # as no other test has them, for caches that a process has but one of
DOCUMENTS = torch.tensor([0, 3, 3, 20, 23])


def kept() -> dict[int, Tensor]:
    """The tensors there are that are good for nothing but inference."""
    gc.collect()
    return {id(x): x for x in gc.get_objects() if type(x) is Tensor and x.is_inference()}


def kept_since(before: dict[int, Tensor]) -> list[torch.Size]:
    """The shapes of those that have come and stay. What a message has sent goes when its thread is done with it."""
    deadline = time.monotonic() + PATIENCE
    while (new := [x.shape for name, x in kept().items() if name not in before]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return new


def check(parallel: SequenceParallel, mixer: str, documents: Tensor | None) -> None:
    """Validates, trains on the same sequence, and compares with training without validation."""
    torch.manual_seed(0)
    model = Decoder(tiny(mixer, "LN")).double()
    tokens = torch.randint(64, (1, TOKENS))

    def gradient(seq) -> Tensor:
        loss = seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(tokens)))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    seq, before = parallel.sequence(TOKENS, documents), kept()
    with torch.inference_mode():
        model(seq.shard(tokens), seq, labels=seq.shard(tokens))
        seq.linear_attention(*(torch.zeros(1, len(seq.positions), 2, 4) for _ in range(3)), causal=False)
    assert kept_since(before) == []
    whole = gradient(seq)
    if parallel.group is not None:
        dist.all_reduce(whole, group=parallel.group)
    assert error(whole, gradient(SequenceParallel(None).sequence(TOKENS, documents))) < 1e-10


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["", "documents"])
@pytest.mark.parametrize("mixer", ["gla", "gated_delta_net", "mamba2"])
def test_validation_before_training(mixer: str, documents: Tensor | None):
    check(SequenceParallel(None, layout="zigzag"), mixer, documents)


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.ranks(3)
@pytest.mark.cpu_only("its models are a CPU's")
@pytest.mark.parametrize("exchange", ["all_gather", "symmetric_memory"])
@pytest.mark.parametrize("mixer", ["gated_delta_net", "mamba2"])
def test_validation_before_training_on_several_ranks(group: dist.ProcessGroup, mixer: str, exchange: str):
    for documents in (None, DOCUMENTS):
        check(SequenceParallel(group, layout="zigzag", state_exchange=exchange), mixer, documents)


@pytest.mark.skipif(find_spec("triton") is None, reason="wants Triton")
def test_what_device_kernels_keep():
    before = kept()
    with torch.inference_mode():
        x = torch.zeros(1, TOKENS, 1, 16, device=torch.get_default_device())
        linear_attention(x, x, x, backend="triton")
        attention._offsets((TOKENS, 2 * TOKENS), torch.device("cpu"))
        del x
    assert kept_since(before) == []
