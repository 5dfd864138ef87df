"""Conversations: what is learnt of them, through chat templates and without, and records that are none."""

import json
from itertools import pairwise

import pytest

from lasp import cli
from lasp.data import TokenFile, load_tokenizer
from lasp.data.prepare import prepare

QUESTION, ANSWER = {"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "return x"}
SYSTEM, THANKS = {"role": "system", "content": "def"}, {"role": "user", "content": "<|end|>"}
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
FORGETFUL = "{{ messages | length }}" + PLAIN


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def documents(prefix):
    """(token ids, those that are labels) of each document."""
    file = TokenFile(prefix)
    spans = list(pairwise(file.document_starts))
    return [(file.tokens[a:b], file.tokens[a:b][file.mask[a:b] == 1]) for a, b in spans]


@pytest.fixture
def chat_tokenizer(tmp_path, hugging_face_file):
    """Writes a tokenizer's directory with a chat template, whose markers are special tokens; returns its path."""
    pytest.importorskip("transformers")

    def make(template):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        path = hugging_face_file(folder / "tokenizer.json")
        content = json.loads(path.read_text())
        first = max(content["model"]["vocab"].values()) + 1
        like = content["added_tokens"][0]
        for number, name in enumerate(("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")):
            content["added_tokens"].append({**like, "id": first + number, "content": name})
        path.write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return str(folder)

    return make


def chat(tokenizer):
    from lasp.integrations.huggingface.chat import HuggingFaceChat

    return lambda: HuggingFaceChat(tokenizer)


def no_template():
    raise AssertionError("a template was asked for")


def test_the_completion_of_a_text_is_learnt(tmp_path):
    pairs = [("Größe: ", "12"), ("", "x"), ("unanswered", "")]
    path = write(tmp_path / "x.jsonl", *({"prompt": p, "completion": c} for p, c in pairs))
    result = prepare([path], tmp_path / "out", valid_fraction=0, chat=no_template)
    read = [(bytes(ids[:-1].tolist()).decode(), learnt.tolist()) for ids, learnt in documents(tmp_path / "out_train")]
    assert read == [("Größe: 12", [*b"12", 256]), ("x", [*b"x", 256])]
    assert result.skipped == {
        "records with nothing to learn: no completion, or no turn of an assistant's": (1, f"{path}:3")
    }
    assert result.train.labels == 4  # the second document's first token is none
    assert f"{result.train.tokens} tokens, 4 of them labels" in str(result)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_all_turns_of_the_assistant_are_learnt(tmp_path, chat_tokenizer, template):
    folder = chat_tokenizer(template)
    turns = [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER, THANKS]
    path = write(tmp_path / "x.jsonl", {"messages": turns}, {"messages": [QUESTION]}, {"messages": turns[:3]})
    result = prepare([path], tmp_path / "out", folder, valid_fraction=0, chat=chat(folder))
    assert result.train.documents == 2
    tokenizer = load_tokenizer(folder)
    ids = {name: tokenizer._tokenizer.token_to_id(name) for name in ("<|user|>", "<|assistant|>", "<|end|>")}
    answer = [*tokenizer.encode("return x").tolist(), ids["<|end|>"]]
    (all_ids, learnt), (_, short) = documents(tmp_path / "out_train")
    assert learnt.tolist() == answer * 2
    assert short.tolist() == [*answer, tokenizer.eod]  # a document that ends with the assistant's words ends there
    assert all_ids[-1] == tokenizer.eod
    assert (all_ids == ids["<|assistant|>"]).sum() == 2
    assert (all_ids == ids["<|user|>"]).sum() == 3


def test_the_completion_of_messages_is_learnt(tmp_path, chat_tokenizer):
    folder = chat_tokenizer(PLAIN)
    path = write(tmp_path / "x.jsonl", {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    prepare([path], tmp_path / "out", folder, valid_fraction=0, chat=chat(folder))
    ((_, learnt),) = documents(tmp_path / "out_train")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(learnt) == "return x"


def test_a_template_whose_prefixes_change_is_refused(tmp_path, chat_tokenizer):
    folder = chat_tokenizer(FORGETFUL)
    path = write(tmp_path / "x.jsonl", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match=r"x\.jsonl:1: chat template: got another text .* \{% generation %\}"):
        prepare([path], tmp_path / "out", folder, valid_fraction=0, chat=chat(folder))


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    pytest.importorskip("transformers")
    path = write(tmp_path / "x.jsonl", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match=r"tokenizer: got 'byte', expected .* with a chat template"):
        prepare([path], tmp_path / "out", valid_fraction=0, chat=chat("byte"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"x\.jsonl:1: got \['text'\], expected the field messages, or prompt and completion"),
        ({"messages": []}, r"x\.jsonl:1: messages: got '\[\]', expected a list of messages"),
        ({"messages": ["hello"]}, "messages: got 'hello', expected a list of messages"),
        ({"prompt": "a", "completion": 3}, "prompt: got 'a', expected a text, as the other field, or a list"),
        ({"prompt": [QUESTION], "completion": "a"}, "completion: got 'a', expected a text, as the other field"),
        ({"messages": [QUESTION], "tools": "x"}, "tools: got 'x', expected a list"),
        ({"prompt": "a", "completion": ""}, r"got no document .*nothing to learn: no completion"),
    ],
)
def test_bad_records(tmp_path, record, message):
    path = write(tmp_path / "x.jsonl", record)
    with pytest.raises(ValueError, match=message):
        prepare([path], tmp_path / "out", valid_fraction=0, chat=no_template)
    assert not list(tmp_path.glob("out*"))


def test_the_command(tmp_path, capsys):
    records = [{"prompt": f"{number}+{number}=", "completion": str(2 * number)} for number in range(20)]
    path = write(tmp_path / "x.jsonl", *records)
    cli.main(["prepare", str(path), "--output", str(tmp_path / "out"), "--chat", "--valid-fraction", "0.2"])
    assert "16 documents" in capsys.readouterr().out
    assert (tmp_path / "out_valid.mask").stat().st_size == TokenFile(tmp_path / "out_valid").num_tokens
