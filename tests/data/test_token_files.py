"""Token files: round trips, Megatron's own reader and writer, and refusal of whatever is not whole."""

import struct

import numpy as np
import pytest
import torch

from lasp.data import TokenFile, TokenFileWriter
from lasp.data.indexed import DTYPES, HEADER, VocabularyTokens, token_dtype

DTYPE_LIST = [dtype.newbyteorder("=") for dtype in DTYPES.values()]
LENGTHS = [5, 1, 12, 3]


@pytest.fixture
def documents():
    generator = np.random.default_rng()
    return [generator.integers(0, 128, size=length) for length in LENGTHS]


def check_documents(file, documents):
    assert file.num_documents == len(documents)
    assert file.num_tokens == sum(map(len, documents))
    for index, document in enumerate(documents):
        np.testing.assert_array_equal(file.document(index), document)
        np.testing.assert_array_equal(file.document(index)[1:4], document[1:4])


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
@pytest.mark.parametrize("max_sequence", [4, 2**31 - 1])
def test_round_trip(tmp_path, documents, dtype, max_sequence):
    with TokenFileWriter(tmp_path / "new" / "data", dtype, max_sequence=max_sequence) as writer:
        for document in documents:
            writer.add_document(document)
    assert (writer.num_documents, writer.num_tokens) == (4, 21)
    file = TokenFile(tmp_path / "new" / "data")
    assert file.dtype == dtype
    check_documents(file, documents)


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
@pytest.mark.parametrize("max_sequence", [4, 2**31 - 1])
def test_megatron_reads_ours(tmp_path, documents, dtype, max_sequence):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    with TokenFileWriter(tmp_path / "data", dtype, max_sequence=max_sequence) as writer:
        for document in documents:
            writer.add_document(document)
    theirs = megatron.IndexedDataset(str(tmp_path / "data"))
    assert theirs.index.dtype == dtype.type
    assert len(theirs.document_indices) == len(documents) + 1
    assert len(theirs) == sum(-(-length // max_sequence) for length in LENGTHS)
    for document, first, stop in zip(documents, theirs.document_indices[:-1], theirs.document_indices[1:], strict=True):
        np.testing.assert_array_equal(np.concatenate([theirs[i] for i in range(first, stop)]), document)


@pytest.mark.parametrize("dtype", DTYPE_LIST, ids=str)
def test_we_read_megatrons(tmp_path, documents, dtype):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=dtype.type)
    for document in documents:
        for sequence in np.array_split(document, 2):  # one of them empty where the document is one token
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
    builder.end_document()  # an empty document
    builder.finalize(str(tmp_path / "data.idx"))
    check_documents(TokenFile(tmp_path / "data"), [*documents, np.array([], dtype=dtype)])


def test_same_type_as_megatron():
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for vocab_size in (257, 65499, 65500, 128256):
        assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_an_exception_leaves_what_was_there(prefix, documents):
    before = sorted(path.name for path in prefix.parent.iterdir())

    class Interruption(Exception):
        pass

    with pytest.raises(Interruption), TokenFileWriter(prefix, np.uint8) as writer:
        writer.add_document([1, 2])
        raise Interruption
    assert sorted(path.name for path in prefix.parent.iterdir()) == before == ["data.bin", "data.idx"]
    check_documents(TokenFile(prefix), documents)


def test_a_second_writer_replaces(prefix):
    with TokenFileWriter(prefix, np.int32) as writer:
        writer.add_document([7, 8])
    check_documents(TokenFile(prefix), [np.array([7, 8])])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one"),
        ([[1]], r"\[1, 1\]"),
        ([1.5], "float64"),
        ([-1], "from -1"),
        ([300], "300, expected 0 to 255"),
    ],
)
def test_writer_refuses(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=f"tokens: .*{message}"), TokenFileWriter(tmp_path / "d", np.uint8) as writer:
        writer.add_document(tokens)
    assert not list(tmp_path.iterdir())


def test_writer_refuses_types(tmp_path):
    with pytest.raises(ValueError, match="dtype: got float32, expected one of uint8"):
        TokenFileWriter(tmp_path / "d", np.float32)


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


COUNTS, TABLE = 18, HEADER.size  # where in the index the two counts and the three tables begin
CORRUPTIONS = {
    "bin cut": ("bin", lambda path: path.write_bytes(path.read_bytes()[:-1]), r"got 41 bytes, expected 42"),
    "bin longer": ("bin", lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), r"got 44 bytes, expected 42"),
    "bin empty": ("bin", lambda path: path.write_bytes(b""), r"got 0 bytes, expected 42"),
    "idx empty": ("idx", lambda path: path.write_bytes(b""), r"got 0 bytes, expected at least the header's 34"),
    "idx cut in header": ("idx", lambda path: path.write_bytes(path.read_bytes()[:20]), r"got 20 bytes"),
    "idx cut": ("idx", lambda path: path.write_bytes(path.read_bytes()[:-1]), r"got 121 bytes, expected 122"),
    "idx longer": ("idx", lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"got 123 bytes, expected 122"),
    "multimodal": ("idx", lambda path: path.write_bytes(path.read_bytes() + b"\0" * 4), r"multimodal"),
    "magic": ("idx", lambda path: overwrite(path, 0, b"X"), r"got magic b'XMIDIDX.*expected b'MMIDIDX"),
    "version": ("idx", lambda path: overwrite(path, 9, b"\2"), r"got version 2, expected 1"),
    "unknown type": ("idx", lambda path: overwrite(path, 17, b"\x63"), r"got type code 99, expected an integer type"),
    "float type": ("idx", lambda path: overwrite(path, 17, b"\7"), r"got type code 7 \(float32\)"),
    "wider type": ("idx", lambda path: overwrite(path, 17, b"\4"), r"got byte offsets that do not follow"),
    "sequences": ("idx", lambda path: overwrite(path, COUNTS, b"\5"), r"got 122 bytes, expected 134 for 5 sequences"),
    "borders": ("idx", lambda path: overwrite(path, COUNTS + 8, b"\4"), r"got 122 bytes, expected 114"),
    "huge count": ("idx", lambda path: overwrite(path, COUNTS, b"\xff" * 8), r"got 122 bytes, expected \d{20}"),
    "length": ("idx", lambda path: overwrite(path, TABLE + 12, struct.pack("<i", 4)), r"data\.bin: got 42 bytes"),
    "negative": ("idx", lambda path: overwrite(path, TABLE, struct.pack("<i", -5)), r"a negative sequence length"),
    "pointer": ("idx", lambda path: overwrite(path, TABLE + 16 + 8, b"\1"), r"got byte offsets that do not follow"),
    "border order": ("idx", lambda path: overwrite(path, TABLE + 48 + 8, b"\3"), r"expected ascending ones from 0 to"),
    "last border": ("idx", lambda path: overwrite(path, TABLE + 48 + 32, b"\3"), r"got document borders from 0 to 3"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_files_are_refused(prefix, name):
    ending, corrupt, message = CORRUPTIONS[name]
    corrupt(prefix.with_suffix(f".{ending}"))
    with pytest.raises(ValueError, match=message) as caught:
        TokenFile(prefix)
    assert str(prefix) in str(caught.value)


def test_no_documents_or_tokens(tmp_path):
    with TokenFileWriter(tmp_path / "none", np.uint8):
        pass
    with pytest.raises(ValueError, match=r"none\.idx: got 1 document borders, expected at least 2"):
        TokenFile(tmp_path / "none")
    (tmp_path / "empty.bin").write_bytes(b"")
    tables = struct.pack("<iqqq", 0, 0, 0, 1)  # one sequence without tokens
    (tmp_path / "empty.idx").write_bytes(HEADER.pack(b"MMIDIDX\0\0", 1, 8, 1, 2) + tables)
    with pytest.raises(ValueError, match=r"empty\.bin: got 0 tokens, expected at least 1"):
        TokenFile(tmp_path / "empty")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_files(prefix, ending):
    prefix.with_suffix(f".{ending}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"data\.{ending} is not there; expected token files"):
        TokenFile(prefix)


def test_document_number_out_of_range(prefix):
    with pytest.raises(IndexError, match="got 4, expected 0 to 3"):
        TokenFile(prefix).document(4)


def test_a_fingerprint_tells_what_was_trained_on(tmp_path, documents):
    def fingerprint(name, documents, dtype=np.uint16):
        with TokenFileWriter(tmp_path / name, dtype) as writer:
            for document in documents:
                writer.add_document(document)
        return TokenFile(tmp_path / name).fingerprint()

    first = fingerprint("a", documents)
    assert first == fingerprint("b", documents)
    assert first.startswith("21 uint16 tokens in 4 documents, hash ")
    others = [
        [*documents[:-1], documents[-1] ^ 1],
        [documents[1], documents[0], *documents[2:]],
        [np.concatenate(documents[:2]), *documents[2:]],
        [documents[0][:-1], np.append(documents[0][-1:], documents[1]), *documents[2:]],
    ]
    assert len({first, *(fingerprint("c", other) for other in others), fingerprint("d", documents, np.int32)}) == 6


def test_a_fingerprint_reads_little_of_a_large_file(tmp_path, monkeypatch):
    with TokenFileWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(np.zeros(2**23, np.uint16))
    file, read = TokenFile(tmp_path / "data"), []
    tokens = file.tokens

    class Recorder:
        def __getitem__(self, places):
            read.append(places)
            return tokens[places]

    monkeypatch.setattr(file, "tokens", Recorder())
    file.fingerprint(70_000)  # a vocabulary that the tokens' type cannot leave
    places = np.concatenate(read)
    assert len(read) == 256
    assert len(places) == 2**20
    assert (places.min(), places.max()) == (0, 2**23 - 1)


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 300), (np.int32, 300), (np.int32, -1), (np.int64, 2**40)])
def test_tokens_outside_the_vocabulary_are_named(tmp_path, dtype, bad):
    with TokenFileWriter(tmp_path / "data", dtype) as writer:
        for length in LENGTHS:
            writer.add_document(np.arange(length))
    file = TokenFile(tmp_path / "data")
    tokens = file.tokens.copy()
    tokens[8] = bad
    tokens.tofile(tmp_path / "data.bin")
    file = TokenFile(tmp_path / "data")
    known = VocabularyTokens(file, 257)
    np.testing.assert_array_equal(known[np.array([9, 0, 17])], [3, 0, 11])
    place = rf"data\.bin: got token id {bad} at position 2 of document 2, expected 0 to 256 \(vocab_size=257\)"
    for look in (lambda: known[np.array([20, 8, 1])], lambda: file.fingerprint(257)):
        with pytest.raises(ValueError, match=place):
            look()
    assert file.fingerprint() != ""


MASKS = [[1, 0, 1, 1, 0], [1], [0] * 11 + [1], [1, 0, 0]]


@pytest.fixture
def masked(tmp_path, documents):
    with TokenFileWriter(tmp_path / "data", np.uint16, masked=True) as writer:
        for document, mask in zip(documents, MASKS, strict=True):
            writer.add_document(document, mask)
    assert writer.num_labels == 3  # a document's first token is none
    return tmp_path / "data"


def test_masks(masked, documents):
    file = TokenFile(masked)
    check_documents(file, documents)
    assert file.mask.tolist() == [label for mask in MASKS for label in mask]


def test_a_mask_does_not_outlive_its_tokens(masked, documents):
    with TokenFileWriter(masked, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    assert TokenFile(masked).mask is None
    assert sorted(path.name for path in masked.parent.iterdir()) == ["data.bin", "data.idx"]


def test_a_mask_is_part_of_the_fingerprint(masked):
    before = TokenFile(masked).fingerprint()
    overwrite(masked.with_suffix(".mask"), 1, b"\1")
    assert len({before, TokenFile(masked).fingerprint()}) == 2
    masked.with_suffix(".mask").unlink()
    assert len({before, TokenFile(masked).fingerprint()}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "mask: got none, expected one, as masked=True says"),
        (([1, 2], [1]), r"mask: got int64\[1\], expected 2 zeros and ones"),
        (([1, 2], [1, 2]), "mask: got .*, expected 2 zeros and ones"),
        (([1, 2], [1, 0]), r"d\.mask: got no label, expected at least one token to be predicted"),
    ],
)
def test_bad_masks_are_not_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message), TokenFileWriter(tmp_path / "d", np.uint8, masked=True) as writer:
        writer.add_document(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_mask_takes_none(tmp_path):
    with pytest.raises(ValueError, match="got one, expected none"), TokenFileWriter(tmp_path / "d", np.uint8) as writer:
        writer.add_document([1, 2], [0, 1])


def test_bad_masks_are_not_read(masked, monkeypatch):
    monkeypatch.setattr("lasp.data.indexed.COPIED", 4)  # more than one block
    path = masked.with_suffix(".mask")
    path.write_bytes(b"\0" * 20 + b"\1")
    assert TokenFile(masked).mask is not None
    path.write_bytes(bytes(mask[0] for mask in MASKS for mask in [mask, *[[0]] * (len(mask) - 1)]))
    with pytest.raises(ValueError, match=r"data\.mask: got no label"):
        TokenFile(masked)
    path.write_bytes(b"\1")
    with pytest.raises(ValueError, match=r"data\.mask: got 1 bytes, expected one for each of 21 tokens"):
        TokenFile(masked)
