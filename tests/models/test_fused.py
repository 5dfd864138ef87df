"""What GPUs run as one kernel is the same compiled and not, and the convolution written out is PyTorch's own."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lasp.kernels import fused
from lasp.models import Decoder
from tests.models.helpers import assert_same, config, gradients, random_tokens, sequence


@pytest.mark.parametrize("mixer", ["gated_delta_net", "retention"])
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
