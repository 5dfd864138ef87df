"""Policies of recomputation, MLPs in tiles and activations in host memory: the same gradients from less memory."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.kernels.parked import Parked
from lasp.models import Decoder, products
from lasp.models.layers import SwiGLU
from lasp.models.offload import HostMemory
from lasp.models.recompute import by_layer, recomputing
from tests.models.helpers import MODELS, assert_same, config, decoder, gradients, random_tokens, sequence
from tests.models.saved import counting

TOKENS = 33
every_model = pytest.mark.parametrize(("mixer", "pattern"), MODELS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of at most 10 tokens: 33 make 4, the last shorter than the others."""
    monkeypatch.setattr(products, "TILE", 10 * 128)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """But for rounding, which is larger beside the gradients of gates' vectors, small differences of large sums."""
    matrices = {name for name, gradient in wanted.items() if gradient.ndim > 1}
    assert found.keys() == wanted.keys()
    assert_same(found, {name: gradient for name, gradient in wanted.items() if name in matrices}, 1e-12)
    assert_same(found, {name: gradient for name, gradient in wanted.items() if name not in matrices}, 1e-10)


def train(model: Decoder, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None):
    """The loss, its gradients, and the bytes kept for them."""
    with counting(model) as saved:
        loss, _ = model(tokens, sequence(tokens.shape[1], cu_seqlens), labels=tokens)
    return loss.item(), gradients(model, loss), saved.bytes


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("policy", ["selective", "full"])
@every_model
def test_every_policy_gives_the_same_gradients(mixer, pattern, policy, offload):
    model, tokens = decoder(mixer, pattern), random_tokens(1, TOKENS)
    documents = torch.tensor([0, 7, 20, TOKENS])
    loss, grads, _ = train(model, tokens, documents)
    model.recompute, model.offload_activations = policy, offload
    again, found, _ = train(model, tokens, documents)
    assert again == pytest.approx(loss, rel=1e-14)
    assert_equal(found, grads)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_some_layers_may_run_again_less_than_others(policy):
    """Softmax layers are those first, then the last ones; memory and gradients lie between, or are the same."""
    assert by_layer("full", 2, "LNLN") == ["full", "selective", "full", "selective"]
    assert by_layer("selective", 3, "LNLN") == ["selective", "selective", "selective", "none"]
    assert by_layer("full", None, "LN") == ["full", "full"] and by_layer("none", None, "LN") == ["none", "none"]
    model, tokens = decoder("gated_delta_net", "LN"), random_tokens(1, TOKENS)
    model.offload_activations = True
    _, grads, _ = train(model, tokens)
    model.recompute, kept = policy, []
    for model.recompute_layers in (0, 1, 3, 4, None):
        _, found, saved = train(model, tokens)
        assert_equal(found, grads)
        kept.append(saved)
    assert kept == sorted(kept, reverse=True) and kept[3] == kept[4] and len(set(kept)) == 4


@every_model
def test_each_policy_keeps_less_than_the_one_before(mixer, pattern):
    model, tokens = decoder(mixer, pattern), random_tokens(1, TOKENS)
    kept = []
    for model.recompute in ("none", "selective", "full"):
        kept.append(train(model, tokens)[2])
    none, selective, full = kept
    assert selective < 0.7 * none and full < 0.4 * selective


def test_expensive_steps_are_taken_once_where_they_are_kept(monkeypatch):
    """Products, by their number; `full` stops before the MLP's last one."""
    model, tokens = decoder("gated_delta_net", "LN"), random_tokens(1, TOKENS)
    calls = []
    monkeypatch.setattr(products.F, "linear", lambda *args, real=products.F.linear: calls.append(args) or real(*args))
    counts = {}
    for model.recompute in ("selective", "full"):
        loss, _ = model(tokens, sequence(TOKENS), labels=tokens)
        calls.clear()
        gradients(model, loss)
        counts[model.recompute] = len(calls)
    # qkv, beta, decay, gate, out; the softmax layer's qkv, out; the MLP's first product in its own backward
    assert counts == {"selective": 0, "full": 2 * (5 + 1) + 2 * (2 + 1)}


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_autocast_chooses_the_same_dtypes(policy):
    """Of float32 weights in bfloat16, tiles and all."""
    model, tokens = Decoder(config("gated_delta_net", "LN")), random_tokens(1, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(tokens, sequence(TOKENS), labels=tokens)
        wanted = gradients(model, loss)
        model.recompute = policy
        loss, _ = model(tokens, sequence(TOKENS), labels=tokens)
    assert_same(gradients(model, loss), wanted, 0.02)


def test_frozen_weights_get_no_gradient(small_tiles):
    model, tokens = decoder("gated_delta_net", "L"), random_tokens(1, TOKENS)
    for layer in model.layers:
        layer.mlp.gate_up_proj.weight.requires_grad_(False)
        layer.mixer.qkv_proj.weight.requires_grad_(False)
    results = []
    for model.recompute in ("none", "selective", "full"):
        model.zero_grad()
        model(tokens, sequence(TOKENS), labels=tokens)[0].backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "layers.0.mlp.gate_up_proj.weight" not in results[0]
    for found in results[1:]:
        assert found.keys() == results[0].keys()
        assert_equal(found, results[0])


def test_shared_experts_work_in_tiles_too(small_tiles):
    model = Decoder(replace(config("linear", "L"), num_experts=4, num_shared_experts=1)).double()
    tokens = random_tokens(1, TOKENS)
    _, grads, _ = train(model, tokens)
    for model.recompute in ("selective", "full"):
        assert_equal(train(model, tokens)[1], grads)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that anything made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().size() // x.element_size())
        return result


@pytest.mark.parametrize("policy", [None, "full"], ids=["without gradients", "full"])
def test_what_an_mlp_takes_at_once_is_bounded_by_the_tile(monkeypatch, policy):
    hidden, intermediate = 4, 64
    monkeypatch.setattr(products, "TILE", 16 * 2 * intermediate)
    mlp = SwiGLU(hidden, intermediate)
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
    tokens = 512
    x = torch.randn(1, tokens, hidden, requires_grad=policy is not None)
    with Largest() as largest:
        if policy is None:
            with torch.no_grad():
                mlp(x)
        else:
            recomputing([policy], None)(lambda x, seq: mlp(x), x, None).sum().backward()
    assert largest.most == tokens * hidden  # x, y and their gradients; a tile has as many numbers
    assert len(list(products.tiles(tokens, 2 * intermediate))) == 32


def test_host_memory_gives_back_what_was_saved_and_fetches_ahead(monkeypatch):
    host, fetched, fetch = HostMemory(), [], Parked.fetch
    monkeypatch.setattr(Parked, "fetch", lambda parked: fetched.append(parked._held[0].item()) or fetch(parked))
    leaves = [torch.full((3,), float(i), requires_grad=True) for i in range(3)]
    total = torch.zeros(3)
    with host.hooks():
        for leaf in leaves:
            total = total + leaf**2
    total.sum().backward()
    assert fetched == [2.0, 1.0, 0.0]
    assert all(torch.equal(leaf.grad, 2 * leaf.detach()) for leaf in leaves)


def test_what_has_no_numbers_stays_where_it_is():
    host, x = HostMemory(), torch.empty(0)
    assert host._load(host._save(x)) is x


def test_inputs_of_layers_alone_go_to_the_host(monkeypatch):
    saved = []
    monkeypatch.setattr(
        HostMemory, "_save", lambda self, x, real=HostMemory._save: saved.append(x.shape) or real(self, x)
    )
    model, tokens = decoder("gated_delta_net", "LN"), random_tokens(2, TOKENS)
    for model.recompute in ("none", "selective"):
        model.offload_activations = True
        saved.clear()
        model(tokens, sequence(TOKENS), labels=tokens)[0].backward()
        assert saved == ([] if model.recompute == "none" else [(2, TOKENS, 32)] * 4)


def test_what_is_kept_serves_one_backward_pass():
    model, tokens = decoder("gated_delta_net", "L"), random_tokens(1, TOKENS)
    for model.recompute in ("full", "selective"):
        loss, _ = model(tokens, sequence(TOKENS), labels=tokens)
        loss.backward(retain_graph=True)
        if model.recompute == "full":
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="serve one backward pass"):
                loss.backward()
