"""What trainers and their tools ask of a model: losses, recomputation, adapters, precision, embeddings."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lasp.parallel import SequenceParallel
from tests.integrations.huggingface_models import logits_of, new_decoder, padded, tokens_of

transformers = pytest.importorskip("transformers")

from transformers.utils import find_labels

from lasp.integrations.huggingface import CACHE, to_huggingface

both_heads = pytest.mark.parametrize("tied", [False, True])


class Adapted(nn.Module):
    """A layer with an adapter of low rank around it, as PEFT's: no nn.Linear, though it has a weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) / 10)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 10)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.down.mT @ self.up.mT


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1, b.abs().max())


def test_losses_are_those_of_transformers_own_models(gen):
    model, tokens = to_huggingface(new_decoder(gen)), tokens_of(gen, 2, 9)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=gen) < 0.3, -100)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = model(tokens).logits
    total, count = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum"), (shifted != -100).sum()
    for arguments in ({"labels": labels}, {"shift_labels": shifted}, {"labels": tokens, "shift_labels": shifted}):
        torch.testing.assert_close(model(tokens, **arguments).loss, total / count)
        for items in (17, torch.tensor(17)):
            torch.testing.assert_close(model(tokens, **arguments, num_items_in_batch=items).loss, total / 17)
    assert find_labels(type(model)) == ["labels"]  # all of these a Trainer waits for before it reports a loss


@both_heads
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_blocks_are_recomputed(tied, options, gen):
    model, tokens = to_huggingface(new_decoder(gen, tie_embeddings=tied)).double(), tokens_of(gen, 2, 9)
    ids, mask = padded([tokens[:1, :4], tokens[1:]], 9)
    calls = []
    model.decoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    score = partial(model, ids, attention_mask=mask)
    expected = gradients(model, score().logits.square().sum())
    assert len(calls) == 1
    model.gradient_checkpointing_enable(options)
    assert_same(
        gradients(model, score().logits.square().sum()) if options is None else backward(model, score), expected
    )
    assert len(calls) == 3
    model.eval()
    score()
    with torch.no_grad():
        model.train()(ids)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="every_n_layers: got 2"):
        model.gradient_checkpointing_enable(every_n_layers=2)


def backward(model, score):
    """The same by `backward`, which alone works with re-entrant recomputation."""
    score().logits.square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_an_adapter_around_the_head_learns(gen):
    decoder = new_decoder(gen, tie_embeddings=False).double()
    tokens, labels = tokens_of(gen, 2, 9), tokens_of(gen, 2, 9)
    seq, plain = SequenceParallel(None).sequence(9), logits_of(decoder, tokens)
    decoder.requires_grad_(False)
    decoder.head = Adapted(decoder.head)
    logits = decoder(tokens, seq)
    assert not torch.allclose(logits, plain, atol=1e-3)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    total, count = decoder(tokens, seq, labels=labels)
    assert count == 18
    assert_same([total], [expected])
    assert_same(gradients(decoder, total), gradients(decoder, expected))
    model = to_huggingface(decoder)
    assert_same([model(tokens).logits], [logits])
    for gradient in gradients(model, model(tokens, shift_labels=labels).loss * 18):
        assert gradient.abs().max() > 1e-3
    assert model.get_output_embeddings() is decoder.head


def test_adapters_within_blocks_learn(gen):
    decoder = new_decoder(gen, "mamba2", "LN").requires_grad_(False)
    for name, module in list(decoder.layers.named_modules()):
        if type(module) is nn.Linear:
            path, _, leaf = name.rpartition(".")
            setattr(decoder.layers.get_submodule(path), leaf, Adapted(module))
    model, tokens = to_huggingface(decoder), tokens_of(gen, 1, 9)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert all(gradient.abs().max() > 0 for gradient in gradients(decoder, model(tokens, labels=tokens).loss))


@pytest.mark.parametrize(("mixer", "pattern"), [("gated_delta_net", "LLLN"), ("mamba2", "LN"), ("retention", "L")])
def test_under_autocast(mixer, pattern, gen):
    model, texts = to_huggingface(new_decoder(gen, mixer, pattern)), [tokens_of(gen, 1, n) for n in (4, 9)]
    ids, mask = padded(texts, 9)
    expected = model(ids, attention_mask=mask, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
        generated = model.eval().generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 12)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss))


def test_hidden_states_are_those_of_transformers_own_models(gen):
    model, tokens = to_huggingface(new_decoder(gen)), tokens_of(gen, 2, 9)
    decoder, seq = model.decoder, SequenceParallel(None).sequence(9)
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[0], decoder.embedding(tokens))
    assert torch.equal(states[2], decoder.layers[1](states[1], seq)[0])
    assert torch.equal(decoder.logits(states[-1]), model(tokens).logits)
    assert model(tokens).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 5
    out = model.generate(tokens, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert [step[-1].shape for step in out.hidden_states] == [(2, 9, 32), (2, 1, 32)]


def test_tuples_in_place_of_outputs(gen):
    model, tokens = to_huggingface(new_decoder(gen, "linear", "L")), tokens_of(gen, 2, 9)
    loss, logits, cache = model(tokens, labels=tokens, use_cache=True, return_dict=False)
    assert (loss.ndim, logits.shape, cache.columns) == (0, (2, 9, 64), 9)
    model.config.return_dict = False
    assert len(model(tokens)) == 1
    model.config.use_cache = True
    assert len(model(tokens)) == 2
    assert model(tokens, return_dict=True)[CACHE].columns == 9
    assert CACHE not in model(tokens, return_dict=True, use_cache=False)


@both_heads
@pytest.mark.parametrize("size", [70, 50])
def test_the_vocabulary_is_resized(tied, size, gen, tmp_path):
    model, tokens = to_huggingface(new_decoder(gen, tie_embeddings=tied)).eval(), tokens_of(gen, 1, 9, 50)
    before = model(tokens).logits
    assert model.resize_token_embeddings(size, mean_resizing=False) is model.get_input_embeddings()
    assert (model.config.vocab_size, model.decoder.config.vocab_size) == (size, size)
    after = model(tokens).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :50], before[..., :50])
    model(tokens, labels=torch.full_like(tokens, size - 1))
    with pytest.raises(ValueError, match=f"labels: got '{size} to {size}', expected 0 to {size - 1}"):
        model(tokens, labels=torch.full_like(tokens, size))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.shape == model.decoder.config
    assert torch.equal(loaded(tokens).logits, after)


def test_embeddings_are_exchanged(gen):
    model, tokens = to_huggingface(new_decoder(gen, tie_embeddings=False)), tokens_of(gen, 1, 9)
    embedding, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == (embedding, head)
    model(tokens).logits.sum().backward()
    assert embedding.weight.grad is not None
    assert head.weight.grad is not None
    tied = to_huggingface(new_decoder(gen, tie_embeddings=True))
    assert tied.get_output_embeddings() is None
    with pytest.raises(ValueError, match="set_output_embeddings: got 'a head', expected none: the embeddings are tied"):
        tied.set_output_embeddings(head)
