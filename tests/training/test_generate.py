from dataclasses import replace

import pytest
import torch

from lasp.models import Decoder, Memory
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.generate import advance, choose, generate
from lasp.training.optimizer import build_optimizer
from lasp.training.report import report
from lasp.training.train import train


@pytest.fixture
def model(config):
    """A random model whose checkpoint lies in config.run_dir."""
    model = Decoder(config.model).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    checkpoint.save(config.run_dir, 1, model, build_optimizer(model, config.optimizer), config)
    return model


def text(config, prompt="ab", tokens=12, **settings):
    return "".join(generate(config.run_dir, prompt, tokens, **settings))


def test_greedy_text_is_that_of_the_whole_sequence_forward(config, model):
    """Every token is the likeliest after all tokens before it, computed anew without any memory."""
    ids = list(b"alpha beta")
    written = b""
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), SequenceParallel(None).sequence(len(ids)))
        token = int(logits[0, -1].argmax())
        if token == 256:
            break
        ids.append(token)
        written += bytes([token])
    got = text(config, "alpha beta", temperature=0)
    whole = written.decode(errors="replace")
    assert got in (whole, whole.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert written


def test_the_seed_decides_the_text(config, model):
    assert text(config, seed=5, tokens=40) == text(config, seed=5, tokens=40)
    assert len({text(config, seed=seed, tokens=40) for seed in range(5)}) > 1


def test_prefill_in_parts_is_prefill_at_once(model, monkeypatch):
    tokens = torch.randint(0, 257, (50,))
    whole = advance(model, tokens, Memory())
    monkeypatch.setattr("lasp.training.generate.PREFILL_TOKENS", 7)
    torch.testing.assert_close(advance(model, tokens, Memory()), whole, rtol=1e-10, atol=1e-10)


def test_a_linear_layers_memory_stays_as_large_as_it_was(model):
    def sizes(memory):
        linear = [slots for layer, slots in memory.slots.items() if model.config.layers[layer] == "L"]
        return [slot.numel() for slots in linear for slot in slots]

    memory = Memory()
    advance(model, torch.randint(0, 257, (10,)), memory)
    early = sizes(memory)
    for _ in range(5):
        advance(model, torch.randint(0, 257, (1,)), memory)
    assert sizes(memory) == early
    assert early


def test_nucleus_keeps_the_likeliest_that_reach_top_p():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p, temperature=1.0):
        return {int(choose(logits, temperature=temperature, top_p=top_p, generator=generator)) for _ in range(200)}

    assert drawn(0.3) == {1}
    assert drawn(0.6) == {1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(1.0, temperature=0) == {1}
    assert drawn(0.6, temperature=1e-3) == {1}


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.2])
    generator = torch.Generator().manual_seed(1)
    draws = [int(choose(probabilities.log(), temperature=1.0, top_p=1.0, generator=generator)) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"prompt": ""}, "prompt: got ''"),
    ],
)
def test_bad_settings_are_named(config, model, settings, message):
    with pytest.raises(ValueError, match=message):
        text(config, **settings)


def test_missing_checkpoint_and_tokenizer_are_named(config, model):
    with pytest.raises(ValueError, match="expected a directory with a checkpoint"):
        "".join(generate(config.run_dir + "-elsewhere", "a", 1))
    lost = replace(config, data=replace(config.data, tokenizer="lost/tokenizer.json"))
    checkpoint.save(config.run_dir, 2, model, build_optimizer(model, config.optimizer), lost)
    with pytest.raises(FileNotFoundError, match="lost/tokenizer.json"):
        text(config)


def test_any_checkpoint_can_be_named(config, model, tmp_path, monkeypatch):
    first = text(config, temperature=0)
    other = Decoder(config.model).double()
    checkpoint.save(config.run_dir, 2, other, build_optimizer(other, config.optimizer), config)
    monkeypatch.chdir(f"{config.run_dir}/checkpoints")
    assert "".join(generate("step-00000001", "ab", 12, temperature=0)) == first
    checkpoint.save_weights(tmp_path / "weights", other)
    with pytest.raises(ValueError, match=r"run_dir: got .*, expected .* a checkpoint of one; these are weights alone"):
        "".join(generate(str(tmp_path / "weights"), "ab", 1))


def test_report_compares_the_same_tokens(config):
    loss = train(config)
    got = report(config.run_dir)
    assert (got.step, got.valid_loss) == (6, loss)
    assert 0 < got.bigram_loss < 5.6
    assert got.picture.read_bytes().startswith(b"\x89PNG")
    assert f"{loss:.3f}" in str(got) and f"{got.bigram_loss:.3f}" in str(got)


def test_a_run_without_an_evaluation_has_no_report(config, tmp_path):
    with pytest.raises(FileNotFoundError):
        report(config.run_dir)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: got .* expected a run that was evaluated"):
        report(str(tmp_path))
