"""The decoder with each mixer: causality, documents, padding, gradients, recomputation, initialisation."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lasp.models import Decoder
from lasp.models.decays import ConstantDecay, SigmoidDecay, SoftplusDecay
from lasp.models.layers import rotate
from lasp.parallel import SequenceParallel
from tests.models.helpers import MODELS, assert_same, config, decoder, gradients, random_tokens, sequence

every_model = pytest.mark.parametrize(("mixer", "pattern"), MODELS)


def _well_conditioned(mixer: str, pattern: str) -> Decoder:
    """Weights with which rounding errors hardly grow from layer to layer."""
    return Decoder(replace(config(mixer, pattern), init_std=0.1))


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_closeness_to_float64(mixer, pattern, dtype):
    model, tokens = _well_conditioned(mixer, pattern).double(), random_tokens(2, 13)
    exact = model(tokens, sequence(13))
    logits = model.to(dtype)(tokens, sequence(13))
    loss, count = model(tokens, sequence(13), labels=tokens)
    assert logits.shape == (2, 13, 64) and logits.dtype == dtype
    assert loss.dtype == torch.float32 and count.dtype == torch.int64 and count == 26
    assert (logits.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@every_model
def test_autocast(mixer, pattern):
    model, tokens = _well_conditioned(mixer, pattern), random_tokens(2, 13)
    exact = gradients(model, model(tokens, sequence(13), labels=tokens)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(tokens, sequence(13), labels=tokens)
    rounded = gradients(model, loss)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    error = sum((rounded[name] - exact[name]).square().sum() for name in exact) ** 0.5
    size = sum(gradient.square().sum() for gradient in exact.values()) ** 0.5
    assert 0 < error <= 8 * torch.finfo(torch.bfloat16).eps * size


@every_model
def test_a_token_acts_on_itself_and_later_ones_only(mixer, pattern):
    model, tokens = decoder(mixer, pattern), random_tokens(1, 40)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 64
    difference = (model(tokens, sequence(40)) - model(changed, sequence(40)))[0].norm(dim=-1)
    assert difference[:20].max() <= 1e-12
    assert (difference[20:] > 1e-6).all()


@every_model
def test_packed_documents_are_separate_sequences(mixer, pattern):
    model, tokens, labels = decoder(mixer, pattern), random_tokens(1, 45), random_tokens(1, 45)
    ends = [0, 2, 31, 45]  # the first is shorter than the convolution
    packed = sequence(45, torch.tensor(ends))
    separate = [model(tokens[:, a:b], sequence(b - a), labels=labels[:, a:b])[0] for a, b in itertools.pairwise(ends)]
    logits = torch.cat([model(tokens[:, a:b], sequence(b - a)) for a, b in itertools.pairwise(ends)], dim=1)
    assert (model(tokens, packed) - logits).abs().max() <= 1e-10
    assert (model(tokens, sequence(45)) - logits).abs().max() > 1e-3  # documents that leaked would show
    loss, _ = model(tokens, packed, labels=labels)
    assert_same(gradients(model, loss), gradients(model, sum(separate[1:], separate[0])))


@every_model
def test_padding_changes_neither_loss_nor_gradients(mixer, pattern):
    """One rank holds both units of a zigzag layout, which 41 tokens do not fill."""
    model, tokens, labels = decoder(mixer, pattern), random_tokens(2, 41), random_tokens(2, 41)
    seq = SequenceParallel(None, layout="zigzag").sequence(41, aligned=model.config.aligned)
    assert not seq.valid.all()
    padded, padded_labels = (seq.shard(x).where(seq.valid, 63) for x in (tokens, labels))
    loss, count = model(padded, seq, labels=padded_labels)
    plain_loss, plain_count = model(tokens, sequence(41), labels=labels)
    assert count == plain_count == 82
    assert (loss - plain_loss).abs() <= 1e-10 * plain_loss
    assert (seq.unshard(model(padded, seq)) - model(tokens, sequence(41))).abs().max() <= 1e-10
    assert_same(gradients(model, loss), gradients(model, plain_loss))


@every_model
def test_gradients_are_those_of_the_loss(mixer, pattern):
    """Along a random direction in the space of all parameters, against central differences."""
    model, tokens, labels = decoder(mixer, pattern), random_tokens(1, 24), random_tokens(1, 24)
    labels[0, :3] = -100
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) * p.detach().abs().mean() for name, p in parameters.items()}

    def loss_at(step: float) -> torch.Tensor:
        moved = {name: p.detach() + step * direction[name] for name, p in parameters.items()}
        return torch.func.functional_call(model, moved, (tokens, sequence(24)), {"labels": labels})[0]

    loss, count = model(tokens, sequence(24), labels=labels)
    logits = model(tokens, sequence(24))
    assert count == 21
    assert (loss - F.cross_entropy(logits[0], labels[0], reduction="sum")).abs() <= 1e-10 * loss
    slopes = [gradient * direction[name] for name, gradient in gradients(model, loss).items()]
    h = 1e-7  # the curvature where a norm or gate is near its bend asks for small steps
    numeric = (loss_at(h) - loss_at(-h)) / (2 * h)
    slope, size = (sum(reduce(s) for s in slopes) for reduce in (torch.sum, torch.norm))
    assert (slope - numeric).abs() <= 1e-6 * size


@every_model
def test_recomputing_layers_gives_the_same_gradients_from_less_memory(mixer, pattern):
    model, tokens = decoder(mixer, pattern), random_tokens(1, 33)

    def run() -> tuple[dict[str, torch.Tensor], int]:
        saved = 0

        def keep(x: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, _ = model(tokens, sequence(33), labels=tokens)
        kept = saved
        return gradients(model, loss), kept

    plain, plain_saved = run()
    model.checkpoint_layers = True
    recomputed, recomputed_saved = run()
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    assert recomputed_saved < plain_saved / 4


@every_model
def test_initialisation_fills_everything_and_depends_on_the_seed_alone(mixer, pattern):
    with torch.device("meta"):
        model = Decoder(config(mixer, pattern))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")

    def fill(seed: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for x in itertools.chain(model.parameters(), model.buffers()):
                x.fill_(torch.nan)
        model.init_weights(torch.Generator().manual_seed(seed))
        return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}

    first, again, other = fill(1), fill(1), fill(2)
    assert all(x.isfinite().all() for x in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.mlp.out_proj.weight"], other["layers.0.mlp.out_proj.weight"])
    residual, inner = first["layers.0.mlp.out_proj.weight"], first["layers.0.mlp.gate_up_proj.weight"]
    assert inner.std() == pytest.approx(0.25, rel=0.05)
    assert residual.std() == pytest.approx(0.25 / 8**0.5, rel=0.05)

    torch.manual_seed(3)
    model.init_weights()
    built_late = model(torch.arange(9)[None], sequence(9))
    torch.manual_seed(3)
    model.init_weights()
    assert torch.equal(model(torch.arange(9)[None], sequence(9)), built_late)


@every_model
def test_decays_never_grow_a_state(mixer, pattern):
    model = decoder(mixer, pattern)
    x = 100 * torch.randn(2, 50, 32, dtype=torch.float64)  # gates that saturate both ways
    for module in model.modules():
        if isinstance(module, ConstantDecay | SigmoidDecay | SoftplusDecay):
            decay = module(x)
            assert (decay <= 0).all() and (decay < 0).any()
            assert module.bfloat16()(x.bfloat16()).dtype == torch.float32
            module.double()


def test_constant_decays_are_those_of_the_papers():
    lightning, retention = decoder("lightning", "L"), decoder("retention", "L")
    for index in range(4):
        name = f"layers.{index}.mixer.decay.log_decay"
        slopes = torch.tensor([-(2.0**-4), -(2.0**-8)]) * (1 - index / 4)
        assert torch.allclose(lightning.get_buffer(name), slopes.double(), rtol=1e-14)
        rates = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64)
        assert torch.allclose(retention.get_buffer(name).exp(), rates, rtol=1e-14)


def test_softplus_decays_begin_in_their_range():
    gate = SoftplusDecay(16, heads=500, key_dim=4).double()
    with torch.no_grad():
        gate.init_parameters(None)
        dt, rates = F.softplus(gate.dt_bias), gate.A_log.exp()
    for values, (low, high) in ((dt, (0.001, 0.1)), (rates, (1.0, 16.0))):
        assert low * 0.9999 <= values.min() <= low * 1.2
        assert high * 0.9 <= values.max() <= high * 1.0001


@pytest.mark.parametrize(
    "mixer", ["mamba2", "gated_delta_net", "kda", "log_linear_mamba2", "log_linear_gated_delta_net"]
)
def test_decays_may_begin_slower(mixer):
    rates = []
    for factor in (1.0, 1 / 16):
        torch.manual_seed(0)
        model = Decoder(replace(config(mixer, "L"), decay_init=factor))
        rates.append(torch.cat([gate.A_log.exp() for gate in model.modules() if isinstance(gate, SoftplusDecay)]))
    assert len(rates[0]) > 0
    assert torch.allclose(rates[1], rates[0] / 16)


def test_positions_far_out_rotate_exactly():
    """Attention depends on distances alone, at position ten million as at the start."""
    q, k, near = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64), torch.tensor([5])

    def score(position: torch.Tensor, distance: int) -> torch.Tensor:
        return (rotate(q, position, 5e5) * rotate(k, position - distance, 5e5)).sum()

    far = near + 10_000_000
    assert (score(near, 3) - score(far, 3)).abs() <= 1e-4
    assert (score(near, 3) - score(far, 2)).abs() > 1e-2


def test_rotation_follows_its_definition():
    x, positions = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    rotated = rotate(x, positions, 100.0)
    for i in range(4):
        angles = positions.double() * 100.0 ** (-i / 4)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        expected = torch.complex(x[..., i], x[..., i + 4]) * turn
        assert torch.allclose(torch.complex(rotated[..., i], rotated[..., i + 4]), expected, rtol=0, atol=1e-14)


def test_tied_and_untied_heads():
    tied, untied = (Decoder(replace(config("linear", "L"), tie_embeddings=tie)) for tie in (True, False))
    names = [{name for name, _ in model.named_parameters()} for model in (tied, untied)]
    assert names[1] - names[0] == {"head.weight"}
    tokens = random_tokens(1, 7)
    grads = gradients(untied, untied(tokens, sequence(7), labels=tokens)[0])
    unseen = [i for i in range(64) if i not in tokens]
    assert grads["embedding.weight"][tokens[0]].norm() > 0
    assert grads["embedding.weight"][unseen].norm() == 0  # only looked up
    assert grads["head.weight"][unseen].norm() > 0


def test_tensors_that_do_not_fit_are_refused():
    model, tokens = decoder("linear", "LN"), random_tokens(1, 8)
    with pytest.raises(ValueError, match=r"tokens: got \[1, 8\], expected \[B, 9\]"):
        model(tokens, sequence(9))
    with pytest.raises(ValueError, match=r"tokens: got \[8\]"):
        model(tokens[0], sequence(8))
    with pytest.raises(ValueError, match=r"labels: got \[1, 7\]"):
        model(tokens, sequence(8), labels=tokens[:, 1:])
    size = model.config.vocab_size
    for bad in (size, -1):
        with pytest.raises(ValueError, match=f"tokens: got {bad}, expected 0 to {size - 1} "):
            model(tokens.masked_fill(torch.arange(8) == 3, bad), sequence(8))
        with pytest.raises(ValueError, match=f"labels: got {bad}, expected 0 to {size - 1} .*or -100"):
            model(tokens, sequence(8), labels=tokens.masked_fill(torch.arange(8) == 3, bad))


def test_the_head_may_look_at_labelled_tokens_alone():
    model, tokens = decoder("gla", "L"), random_tokens(2, 11)
    labels = torch.full((2, 11), -100)
    labels[0, 3], labels[1, [0, 10]] = 5, torch.tensor([7, 9])
    places = (labels.flatten() != -100).nonzero()[:, 0]
    whole, count = model(tokens, sequence(11), labels=labels)
    some, number = model(tokens, sequence(11), labels=labels, scored=places)
    assert count == number == 3
    assert (some - whole).abs() <= 1e-12 * whole
    assert_same(gradients(model, some), gradients(model, whole))
    with pytest.raises(ValueError, match="scored: got 'places', expected None without labels"):
        model(tokens, sequence(11), scored=places)
    nothing, number = model(tokens, sequence(11), labels=labels, scored=places[:0])
    assert (nothing, number) == (0, 0)
    assert all(not gradient.any() for gradient in gradients(model, nothing).values())
