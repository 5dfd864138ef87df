"""What GPUs run as one kernel is the same compiled and not, and keeps little but its inputs."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lasp.kernels import fused
from lasp.models import Decoder
from lasp.models.decays import log_sigmoid, softplus_decay
from tests.models.helpers import assert_same, config, gradients, random_tokens, sequence


@pytest.mark.parametrize("mixer", ["gated_delta_net", "retention", "kda", "hgrn2"])
def test_a_compiled_model_has_the_same_loss_and_gradients(monkeypatch, mixer):
    """With experts, with recomputation, and with a second length, for which shapes are compiled as variables."""
    device, backend = ("cuda", "inductor") if torch.cuda.is_available() else ("cpu", "aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    model = Decoder(replace(config(mixer, "LN"), num_experts=4, moe_every=2)).double().to(device)
    model.checkpoint_layers = True
    for tokens in (40, 56):
        inputs = random_tokens(1, tokens).to(device), sequence(tokens)
        labels = random_tokens(1, tokens).to(device)
        results, asked = [], []
        for is_large in (lambda x: False, lambda x, asked=asked: asked.append(x) or True):
            monkeypatch.setattr(fused, "is_large", is_large)
            loss, _ = model(*inputs, labels=labels)
            results.append((loss.detach(), gradients(model, loss)))
        (loss, grads), (compiled_loss, compiled_grads) = results
        assert len(asked) >= 10
        assert (loss - compiled_loss).abs() <= 1e-12 * loss
        assert_same(compiled_grads, grads)


@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_a_compiled_gate_keeps_what_it_is_made_of(monkeypatch, gate):
    """In its own dtype, and nothing in float32 that is as large. The partition is inductor's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True))
    monkeypatch.setattr(fused, "is_large", lambda x: True)
    x = torch.randn(1, 16, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    bias, rate = torch.randn(4, 32, requires_grad=True), torch.randn(4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        if gate == "softplus":
            decay = fused.fused(softplus_decay.__wrapped__)(x, bias, rate)  # not as other tests have compiled it
        else:
            decay = fused.fused(log_sigmoid.__wrapped__)(x, 1 / 16)
    assert decay.dtype == torch.float32
    assert [y.dtype for y in kept if y.shape == x.shape] == [torch.bfloat16]
