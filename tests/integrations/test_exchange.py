"""From a training run to Hugging Face, and from there into another run, by the commands of the shell."""

import shlex
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tests.data.conftest
from lasp import cli
from lasp.config import ModelConfig
from lasp.models import Decoder
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.generate import generate
from lasp.training.train import train
from tests.training import conftest

transformers = pytest.importorskip("transformers")

from lasp.integrations.llama import from_llama
from lasp.integrations.output import new_directory

config, data = conftest.config, conftest.data
hugging_face_file = tests.data.conftest.hugging_face_file


@pytest.fixture
def begun(monkeypatch):
    """The configurations that `lasp train` was asked to run."""
    configs = []
    monkeypatch.setattr("lasp.training.train.train", configs.append)
    return configs


def weights_of(path):
    model = Decoder(ModelConfig(**checkpoint.read_config(path)["model"]))
    checkpoint.load_model(path, model)
    return model.state_dict()


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def test_a_run_goes_to_hugging_face_and_back(config, tmp_path, capsys, gen):
    config = replace(config, dtype="float32", steps=1)
    train(config)
    trained = checkpoint.require_latest(config.run_dir)
    cli.main(["export", config.run_dir, str(tmp_path / "hf")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(model.decoder.state_dict(), weights_of(trained))
    assert model.config.eos_token_id == 256
    decoder = Decoder(config.model)
    checkpoint.load_model(trained, decoder)
    tokens = torch.randint(0, 257, (1, 50), generator=gen)
    assert torch.equal(model(tokens).logits, decoder(tokens, SequenceParallel(None).sequence(50)))

    cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "weights")])
    assert f"--initial-weights {tmp_path}/weights" in capsys.readouterr().out
    assert_same(weights_of(tmp_path / "weights"), weights_of(trained))
    with pytest.raises(ValueError, match="output: got .*, expected a new or empty directory"):
        cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "weights")])


def test_a_run_begins_from_a_llama(config, begun, tmp_path, capsys):
    shape = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, **rope))
    llama.save_pretrained(tmp_path / "llama")
    weights = tmp_path / "weights"
    source = [str(tmp_path / "llama"), str(weights)]
    cli.main(["import", *source, "--pattern", "LN", "--mixer", "retention", "--seed", "5"])
    torch.manual_seed(5)
    expected = from_llama(llama, pattern="LN", mixer="retention").state_dict()
    assert_same(weights_of(weights), expected)

    # The option that was printed brings the model, and the run's first loss is that of the weights.
    cli.main(["train", "quickstart", *shlex.split(capsys.readouterr().out)])
    assert begun[0].initial_weights == str(weights)
    config = replace(config, model=begun[0].model, initial_weights=str(weights), dtype="float32", steps=1)
    first = replace(config, optimizer=replace(config.optimizer, lr=1e-30, weight_decay=0.0))
    train(first)
    assert_same(weights_of(checkpoint.require_latest(first.run_dir)), expected)

    other = replace(config, run_dir=str(tmp_path / "other"), model=replace(config.model, pattern="LLLN"))
    with pytest.raises(ValueError, match=f"checkpoint {weights}: got another model"):
        train(other)


def test_other_models_are_refused(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type: got 'gpt2', expected lasp or llama"):
        cli.main(["import", str(tmp_path), str(tmp_path / "weights")])


@pytest.mark.parametrize("to", ["huggingface", "megatron"])
def test_what_is_there_is_not_touched(config, tmp_path, monkeypatch, to):
    monkeypatch.setattr(checkpoint, "require_latest", lambda run_dir: pytest.fail("work was done"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "folder", "link"):
        with pytest.raises(ValueError, match=f"output: got '{tmp_path}/{name}', expected a new or empty directory"):
            cli.main(["export", config.run_dir, str(tmp_path / name), "--to", to])
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/config.json").read_text() == "mine"


def test_a_directory_is_whole_or_absent(tmp_path, monkeypatch):
    def half(folder):
        with new_directory(tmp_path / "new" / "out") as unfinished:
            (unfinished / "weights").write_text("half")
            assert not folder.exists() or not any(folder.iterdir())
            raise KeyboardInterrupt

    for folder in (tmp_path / "new" / "out", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt):
            half(folder)
        assert not any((tmp_path / "new").iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_directory(tmp_path / "link") as unfinished:
        (unfinished / "weights").write_text("whole")
    assert (tmp_path / "empty/weights").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "new"]


def test_a_run_is_exported_from_any_folder(config, hugging_face_file, tmp_path, monkeypatch):
    """Its paths were relative, and its tokenizer has been moved since, with what a chat needs of it."""
    folder, elsewhere = tmp_path / "tokenizer", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    hugging_face_file(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}')
    monkeypatch.chdir(tmp_path)
    data = replace(config.data, tokenizer="tokenizer")
    model = replace(config.model, vocab_size=300)
    train(replace(config, data=data, model=model, run_dir="run", dtype="float32", steps=1))
    monkeypatch.chdir(elsewhere)
    shutil.rmtree(folder)
    cli.main(["export", "../run", "hf"])
    cli.main(["export", "../run/checkpoints/step-00000001", "one"])
    assert Path("one/tokenizer.json").read_bytes() == Path("hf/tokenizer.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    assert tokenizer.chat_template == "{{ messages }}"
    assert "".join(generate("../run", "def", 3, temperature=0)) is not None
    saved = checkpoint.read_config(checkpoint.require_latest("../run"))["data"]
    assert (saved["train"], saved["tokenizer"]) == (config.data.train, str(folder))


def test_importing_what_is_not_there_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("went to the network"))
    for source in ("nothere", "meta-llama/Llama-3.2-1B", str(tmp_path)):
        with pytest.raises(ValueError, match=f"source: got '{source}', expected a directory with a config.json"):
            cli.main(["import", source, str(tmp_path / "weights")])
    assert not (tmp_path / "weights").exists()
