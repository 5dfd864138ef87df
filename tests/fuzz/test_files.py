"""Files that were damaged, and bytes that never were what their name says: the same tokens, or ValueError."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasp.data import PackedContexts, TokenFile, TokenFileWriter
from lasp.data.documents import Skipped, Source
from lasp.data.indexed import DTYPES

DTYPE_LIST = sorted(DTYPES.values(), key=str)


@st.composite
def damage(draw: st.DrawFn) -> tuple:
    """What to do to a file's bytes: kind, a place as a share of the length, and new bytes."""
    kind = draw(st.sampled_from(["flip", "replace", "cut", "append", "insert"]))
    return kind, draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))


def damaged(content: bytes, done: tuple) -> bytes:
    kind, share, new = done
    at = min(int(share * len(content)), len(content) - 1)
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (new[0] or 1)]) + content[at + 1 :]
    if kind == "replace":
        return content[:at] + new + content[at + len(new) :]
    if kind == "cut":
        return content[:at]
    return content + new if kind == "append" else content[:at] + new + content[at:]


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[np.ndarray], np.dtype]:
    dtype = draw(st.sampled_from(DTYPE_LIST))
    most = min(int(np.iinfo(dtype).max), 2**40)
    token = st.integers(0, most)
    found = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=6))
    return [np.array(document, dtype=dtype) for document in found], dtype


@given(documents(), st.integers(1, 20), st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_contexts_are_the_documents_in_some_order(drawn, longest, length, seed, shuffle):
    found, dtype = drawn
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with TokenFileWriter(prefix, dtype, max_sequence=longest) as writer:
            for document in found:
                writer.add_document(document)
        total = sum(map(len, found))
        if length > total:
            with pytest.raises(ValueError, match="context_length"):
                PackedContexts(prefix, length, seed=seed)
            return
        contexts = PackedContexts(prefix, length, seed=seed, shuffle=shuffle)
        epochs = -(-3 * total // length) + 1
        stream = np.concatenate([contexts[i].tokens(0, length).numpy() for i in range(epochs)])
        for epoch in range(3):
            tokens = stream[epoch * total : (epoch + 1) * total]
            if not shuffle:
                np.testing.assert_array_equal(tokens, np.concatenate(found).astype(np.int64))
            np.testing.assert_array_equal(np.sort(tokens), np.sort(np.concatenate(found).astype(np.int64)))
        context = contexts[0]
        tokens, labels = context.tokens(0, length), context.labels(0, length)
        assert int((labels >= 0).sum()) <= context.count_labels() == int((labels != -100).sum())
        following = labels[:-1] != -100
        assert (labels[:-1][following] == tokens[1:][following]).all()


@given(documents(), damage())
def test_a_damaged_index_is_noticed_or_changes_nothing(drawn, done):
    found, dtype = drawn
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with TokenFileWriter(prefix, dtype) as writer:
            for document in found:
                writer.add_document(document)
        index = Path(f"{prefix}.idx")
        index.write_bytes(damaged(index.read_bytes(), done))
        try:
            file = TokenFile(prefix)
        except ValueError as error:
            assert str(index) in str(error) or f"{prefix}.bin" in str(error)
            return
        assert file.num_tokens * file.dtype.itemsize == sum(map(len, found)) * dtype.itemsize
        if file.dtype == dtype:  # else only the vocabulary can tell
            whole = np.concatenate([file.document(i) for i in range(file.num_documents)])
            np.testing.assert_array_equal(whole, np.concatenate(found))


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.one_of(VALUES.map(json.dumps), st.just(""), st.text(max_size=8)), max_size=6), st.none() | damage())
def test_json_lines_are_read_or_refused_by_line(lines, done):
    """Of a file that says what it holds, whatever it holds."""
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    content = damaged(content, done) if done and content else content
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        try:
            texts = ["".join(found.parts) for found in Source(path.name, path).documents("text", Skipped())]
        except ValueError as error:
            assert str(path) in str(error)
            return
        expected = [json.loads(line)["text"] for line in content.decode().split("\n") if line.strip()]
        assert texts == [text for text in expected if text]
