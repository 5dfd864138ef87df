"""Packed contexts against the stream written out token by token."""

import numpy as np
import pytest
import torch

from lasp.data import IGNORED, Joined, PackedContexts, TokenFileWriter, local_batch
from lasp.parallel import SequenceParallel, Stream

LENGTHS = [7, 1, 30, 4, 4, 19, 2]  # 67 tokens


@pytest.fixture
def documents():
    """Every token occurs once, so that a wrong one cannot pass for the right one."""
    tokens = np.random.default_rng().permutation(sum(LENGTHS)) + 1
    return np.split(tokens, np.cumsum(LENGTHS)[:-1])


def stream(documents, orders):
    """Tokens, labels and whether a document begins there, of the epochs' documents one after the other."""
    tokens, labels, begins = [], [], []
    for order in orders:
        for index in order:
            document = documents[index].tolist()
            tokens += document
            labels += [*document[1:], IGNORED]
            begins += [True] + [False] * (len(document) - 1)
    return tokens, labels, begins


def whole(context):
    return context.tokens(0, context.length), context.labels(0, context.length)


@pytest.mark.parametrize("length", [1, 5, 8, 30, 67])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_contexts_are_the_stream(prefix, documents, length, shuffle):
    contexts = PackedContexts(prefix, length, seed=3, shuffle=shuffle)
    epochs = 4
    orders = [
        np.random.default_rng([3, epoch]).permutation(len(documents)) if shuffle else range(len(documents))
        for epoch in range(epochs)
    ]
    tokens, labels, begins = stream(documents, orders)
    for index in range(len(tokens) // length):
        span = slice(index * length, (index + 1) * length)
        context = contexts[index]
        got_tokens, got_labels = whole(context)
        assert got_tokens.dtype == got_labels.dtype == context.cu_seqlens.dtype == torch.int64
        assert got_tokens.tolist() == tokens[span]
        assert got_labels.tolist() == labels[span]
        starts = [at for at, begin in enumerate(begins[span]) if begin or at == 0]
        assert context.cu_seqlens.tolist() == [*starts, length]


def test_shuffled_contexts_are_those_of_each_epoch_in_another_order(prefix):
    contexts = PackedContexts(prefix, 10, seed=5)
    epochs = [[contexts.shuffled(number, 10) for number in range(6 * epoch, 6 * epoch + 6)] for epoch in range(8)]
    orders = set()
    for epoch, some in enumerate(epochs):
        in_order = [contexts.at(67 * epoch + 10 * place, 10) for place in range(6)]  # 7 of the 67 tokens are left out
        known = [(context.tokens(0, 10).tolist(), context.cu_seqlens.tolist()) for context in in_order]
        order = [known.index((context.tokens(0, 10).tolist(), context.cu_seqlens.tolist())) for context in some]
        assert sorted(order) == list(range(6))
        orders.add(tuple(order))
    assert len(orders) > 1
    again = PackedContexts(prefix, 10, seed=5).shuffled(9, 10)
    assert again.tokens(0, 10).tolist() == epochs[1][3].tokens(0, 10).tolist()


def test_joined_contexts_stand_one_behind_the_other(prefix):
    """Whatever is read of them; a document that both have a part of is two."""
    contexts = PackedContexts(prefix, 10, seed=0, shuffle=False)
    parts = [contexts[0], contexts[1], contexts[2]]  # the third document is in all of them
    joined = Joined(parts)
    assert joined.length == 30
    assert joined.cu_seqlens.tolist() == [0, 7, 8, 10, 20, 30]
    assert joined.row_length is None
    assert Joined(parts[1:]).row_length == 10
    for kind in ("tokens", "labels"):
        wanted = torch.cat([getattr(part, kind)(0, 10) for part in parts])
        for start, stop in ((0, 30), (3, 27), (10, 20), (12, 12)):
            assert getattr(joined, kind)(start, stop).tolist() == wanted[start:stop].tolist()
    assert joined.count_labels() == (wanted != IGNORED).sum()


def test_a_cut_document_is_predicted_across_the_cut(prefix, documents):
    contexts = PackedContexts(prefix, 20, seed=0, shuffle=False)  # the third document is cut at 20
    assert contexts[0].labels(19, 20).item() == documents[2][12] == contexts[1].tokens(0, 1).item()


def test_empty_documents_leave_no_trace(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for length in (0, 3, 0, 0, 4, 0):
        builder.add_item(torch.arange(length))
        builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    for seed in range(5):
        contexts = PackedContexts(tmp_path / "data", 7, seed=seed)
        assert all(contexts[index].cu_seqlens.tolist() in ([0, 3, 7], [0, 4, 7]) for index in range(20))


def test_random_access_is_a_pure_function(prefix):
    first = PackedContexts(prefix, 9, seed=11)
    sequential = [whole(first[index]) for index in range(40)]
    for index in np.random.default_rng().permutation(40):
        again = PackedContexts(prefix, 9, seed=11)[int(index)]
        for got, expected in zip(whole(again), sequential[index], strict=True):
            assert torch.equal(got, expected)
    other = PackedContexts(prefix, 9, seed=12)
    assert any(not torch.equal(whole(other[index])[0], sequential[index][0]) for index in range(7))


def test_epochs_hold_the_same_tokens_in_another_order(prefix):
    contexts = PackedContexts(prefix, 67, seed=5)
    epochs = [whole(contexts[index])[0] for index in range(4)]
    assert all(torch.equal(epoch.sort().values, torch.arange(1, 68)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_one_epoch(prefix, documents):
    contexts = PackedContexts(prefix, 10, seed=0, shuffle=False)
    assert contexts.num_contexts == 6
    tokens = torch.cat([whole(context)[0] for context in contexts.one_epoch()])
    assert tokens.tolist() == np.concatenate(documents)[:60].tolist()


def test_ranges(prefix):
    context = PackedContexts(prefix, 50, seed=2)[1]
    tokens, labels = whole(context)
    for start in range(0, 51, 5):
        for stop in range(start, 51, 3):
            assert torch.equal(context.tokens(start, stop), tokens[start:stop])
            assert torch.equal(context.labels(start, stop), labels[start:stop])
    for start, stop in ((-1, 3), (4, 3), (0, 51)):
        with pytest.raises(ValueError, match=rf"start, stop: got {start}, {stop}, expected .* <= 50"):
            context.tokens(start, stop)


def test_local_batch_with_padding(prefix):
    context = PackedContexts(prefix, 50, seed=2)[0]
    tokens, labels = whole(context)
    # Zigzag units of 7 on 4 ranks: rank 0 owns the first and the last, which is padding from position 50 on.
    local_tokens, local_labels = local_batch(context, [(0, 7), (49, 56)])
    assert local_tokens.tolist() == [[*tokens[:7].tolist(), tokens[49].item(), *[0] * 6]]
    assert local_labels.tolist() == [[*labels[:7].tolist(), labels[49].item(), *[IGNORED] * 6]]
    assert [x.tolist() for x in local_batch(context, [(56, 58)])] == [[[0, 0]], [[IGNORED, IGNORED]]]
    units = [(unit * 7, unit * 7 + 7) for unit in range(8)]
    assert torch.equal(local_batch(context, units)[1][0, :50], labels)
    with pytest.raises(ValueError, match=r"ranges: got \(5, 3\)"):
        local_batch(context, [(0, 2), (5, 3)])


class Recorder:
    """A memory map that remembers which of its elements were read."""

    def __init__(self, tokens):
        self.inner, self.read = tokens, set()

    def __getitem__(self, index):
        self.read |= set(np.arange(len(self.inner))[index].tolist())
        return self.inner[index]


def test_only_the_own_units_are_read(prefix, monkeypatch):
    contexts = PackedContexts(prefix, 60, seed=0, shuffle=False)
    recorder = Recorder(contexts.file.tokens)
    monkeypatch.setattr(contexts.file, "tokens", recorder)
    context = contexts[0]
    assert not recorder.read
    local_batch(context, [(10, 20), (40, 50), (60, 64)])
    # One more than the unit: the label of its last token.
    assert recorder.read == {*range(10, 21), *range(40, 51)}


def test_bad_arguments(prefix):
    with pytest.raises(ValueError, match=r"context_length: got 68, expected 1 to 67 .*data\.bin"):
        PackedContexts(prefix, 68, seed=0)
    with pytest.raises(ValueError, match="context_length: got 0"):
        PackedContexts(prefix, 0, seed=0)
    with pytest.raises(ValueError, match="seed: got -1"):
        PackedContexts(prefix, 5, seed=-1)
    with pytest.raises(IndexError, match="index: got -1"):
        PackedContexts(prefix, 5, seed=0)[-1]


@pytest.fixture
def masked(tmp_path, documents):
    """The same documents with a mask in which a quarter of the tokens are labels, first ones included."""
    masks = [np.random.default_rng().random(length) < 0.25 for length in LENGTHS]
    masks[2][:] = [True, *[False] * 29]  # of no effect: nothing predicts a document's first token
    masks[5][:] = [False] * 18 + [True]
    with TokenFileWriter(tmp_path / "masked", np.uint16, masked=True) as writer:
        for document, mask in zip(documents, masks, strict=True):
            writer.add_document(document, mask)
    assert writer.num_labels == sum(int(mask[1:].sum()) for mask in masks)
    return tmp_path / "masked", masks


@pytest.mark.parametrize("length", [1, 8, 20, 67])
def test_masked_tokens_are_no_labels(documents, masked, length):
    prefix, masks = masked
    contexts = PackedContexts(prefix, length, seed=3)
    orders = [np.random.default_rng([3, epoch]).permutation(len(documents)) for epoch in range(2)]
    tokens, labels, _ = stream(documents, orders)
    learnt = [m for order in orders for index in order for m in [*masks[index][1:], False]]
    expected = [label if yes else IGNORED for label, yes in zip(labels, learnt, strict=True)]
    for index in range(len(tokens) // length):
        span = slice(index * length, (index + 1) * length)
        got_tokens, got_labels = whole(contexts[index])
        assert got_tokens.tolist() == tokens[span]
        assert got_labels.tolist() == expected[span]
        units = [(0, length // 2), (length // 2, length + 1)]  # with a token of padding
        local = [local_batch(contexts[index], [unit])[1][0] for unit in units]
        assert torch.cat(local).tolist() == [*expected[span], IGNORED]


def test_labels_are_counted_without_reading_tokens(prefix, masked, monkeypatch):
    for path in (prefix, masked[0]):
        contexts = PackedContexts(path, 20, seed=3)
        expected = [int((contexts[i].labels(0, 20) != IGNORED).sum()) for i in range(12)]
        recorder = Recorder(contexts.file.tokens)
        monkeypatch.setattr(contexts.file, "tokens", recorder)
        assert [contexts[i].count_labels() for i in range(12)] == expected
        assert not recorder.read


def test_rows_are_pieces_of_one_length(tmp_path, prefix):
    with TokenFileWriter(tmp_path / "rows", np.uint16) as writer:
        for first in range(0, 40, 4):
            writer.add_document(range(first, first + 4))
    assert PackedContexts(tmp_path / "rows", 12, seed=0)[1].row_length == 4
    assert PackedContexts(tmp_path / "rows", 10, seed=0)[1].row_length is None  # the first and the last are cut
    assert PackedContexts(tmp_path / "rows", 4, seed=0)[1].row_length is None
    assert PackedContexts(prefix, 20, seed=0, shuffle=False)[0].row_length is None


def test_documents_and_places_beyond_two_to_the_31(tmp_path):
    """The file has a hole, of which the file system stores nothing."""
    far = 2**31 + 5
    with TokenFileWriter(tmp_path / "data", np.uint8) as writer:
        writer._bin.seek(far)
        writer._unended = far
        writer.add_document(np.arange(1, 8))
        writer.add_document(np.arange(8, 11))
    contexts = PackedContexts(tmp_path / "data", far, seed=0, shuffle=False)
    assert contexts[0].tokens(far - 1, far).tolist() == [0] and contexts[0].labels(far - 1, far).tolist() == [1]
    whole = contexts.at(0, far + 10)
    assert whole.cu_seqlens.tolist() == [0, far + 7, far + 10]
    assert whole.tokens(far, far + 10).tolist() == [*range(1, 11)]
    assert whole.labels(far, far + 10).tolist() == [2, 3, 4, 5, 6, 7, IGNORED, 9, 10, IGNORED]
    assert whole.count_labels() == far + 8
    last = Stream(SequenceParallel(None), far + 10, 2**31, whole.cu_seqlens)[1]
    assert last.past == 2**31 and last.positions.tolist() == [*range(2**31, far + 7), 0, 1, 2]
