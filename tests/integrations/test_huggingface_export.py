"""An exported directory holds all that evaluation and serving look for, down to the chat template."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tokenizers

from lasp.data import load_tokenizer
from lasp.training.train import train
from tests.training import conftest

transformers = pytest.importorskip("transformers")

from lasp.integrations.convert import export_run
from lasp.integrations.huggingface.tokenizer import export_tokenizer

config, data = conftest.config, conftest.data
TEXTS = ("plain words,  spaces\n\tand tabs", "naïve Ünïcode → 漢字 🙂", "", "\x00\x7f\xa0\u2028")


def word_tokenizer(*names):
    """A tokenizer.json with these special tokens and two words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def test_an_exported_run_needs_no_import_of_lasp(config, tmp_path):
    train(replace(config, dtype="float32", steps=1))
    export_run(config.run_dir, str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100]]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generate(**batch, max_new_tokens=2).shape[1] <= 5
    for settings in (model.config, model.generation_config, tokenizer):
        assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == (256, 256, None)
    # As in an evaluation harness, which knows the directory alone.
    script = f"""
import sys, transformers
assert "lasp" not in sys.modules
for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
    print(type(auto.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LaspConfig", "LaspForCausalLM"], done.stderr


def test_bytes_are_the_same_ids():
    ours, theirs = load_tokenizer("byte"), export_tokenizer("byte")
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    every = list(range(257))
    assert theirs.decode(every, skip_special_tokens=True) == ours.decode(every)
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    ("names", "eos", "pad"),
    [
        (("</s>",), "</s>", "</s>"),
        (("<pad>", "<|endoftext|>"), "<|endoftext|>", "<pad>"),
        (("<|im_end|>", "<eos>", "[PAD]"), "<eos>", "[PAD]"),
    ],
)
def test_a_tokenizer_alone_gets_names_for_its_special_tokens(names, eos, pad, tmp_path):
    word_tokenizer(*names).save(str(tmp_path / "words.json"))
    tokenizer = export_tokenizer(str(tmp_path / "words.json"))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (eos, pad, "left")
    assert tokenizer.eos_token_id == load_tokenizer(tmp_path / "words.json").eod
    assert tokenizer("a b").keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_what_lies_beside_a_tokenizer_is_kept(file, config, tmp_path):
    template = "{% for m in messages %}a {{ m.content }} <|im_end|>{% endfor %}"
    special = {"eos_token": "<|im_end|>", "bos_token": "<s>", "padding_side": "right"}
    source = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("<s>", "<|im_end|>", "<|endoftext|>"), chat_template=template, **special
    )
    source.save_pretrained(tmp_path / "source")
    run = replace(
        config, dtype="float32", steps=1, data=replace(config.data, tokenizer=str(tmp_path / "source" / file))
    )
    train(run)
    export_run(run.run_dir, str(tmp_path / "hf"))
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert kept.chat_template == template
    assert {name: getattr(kept, name) for name in special} == special
    ids = kept.apply_chat_template([{"role": "user", "content": "b"}])["input_ids"]
    assert ids == [0, 1, kept.eos_token_id]
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == [4, 3]  # of documents and of turns
    assert settings.bos_token_id == 2
