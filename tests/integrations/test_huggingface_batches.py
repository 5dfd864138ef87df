"""Packed documents and padding in a batch of Transformers': every text computes what it computes alone."""

import pytest
import torch

from tests.integrations.huggingface_models import logits_of, new_decoder, padded, tokens_of

transformers = pytest.importorskip("transformers")

from lasp.integrations.huggingface import RecurrentCache, to_huggingface

LENGTHS = (5, 11, 1, 7)
every_model = pytest.mark.parametrize(("mixer", "pattern"), [("gated_delta_net", "LLLN"), ("mamba2", "LN")])


def model_of(gen, mixer="gated_delta_net", pattern="LLLN"):
    return to_huggingface(new_decoder(gen, mixer, pattern)).double().eval()


def texts_of(gen):
    return [tokens_of(gen, 1, length) for length in LENGTHS]


def flattened(texts, **options):
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collator([{"input_ids": text[0].tolist()} for text in texts])


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-10


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@every_model
@pytest.mark.parametrize("said_by", ["position_ids", "cu_seq_lens_q", "seq_idx", "all"])
def test_packed_documents_do_not_see_each_other(mixer, pattern, said_by, gen):
    model, texts = model_of(gen, mixer, pattern), texts_of(gen)
    batch = flattened(texts, return_flash_attn_kwargs=True, return_seq_idx=True)
    if said_by != "all":
        batch = {name: batch[name] for name in ("input_ids", said_by)}
    got = model(**batch).logits
    assert_close(got, torch.cat([logits_of(model.decoder, text) for text in texts], dim=1))
    assert not torch.allclose(got, logits_of(model.decoder, batch["input_ids"]), atol=1e-3)  # and it would have shown


def test_the_loss_of_packed_documents_is_that_of_each_alone(gen):
    model, texts = model_of(gen), texts_of(gen)
    loss = model(**flattened(texts)).loss
    alone = [model(text, labels=text).loss * (text.shape[1] - 1) for text in texts if text.shape[1] > 1]
    torch.testing.assert_close(loss, sum(alone) / (sum(LENGTHS) - len(LENGTHS)), rtol=1e-6, atol=0)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_changes_nothing(mixer, pattern, side, dtype, gen):
    model, texts = model_of(gen, mixer, pattern), texts_of(gen)
    ids, mask = padded(texts, 12, side, garbage=10_000)  # no id at all
    output = model(ids, attention_mask=mask.to(dtype), output_hidden_states=True)
    assert (output.logits[mask == 0] == 0).all()
    for row, text in enumerate(texts):
        assert_close(output.logits[row][mask[row] == 1], logits_of(model.decoder, text)[0])
        alone = model(text, output_hidden_states=True).hidden_states
        for got, expected in zip(output.hidden_states, alone, strict=True):
            assert_close(got[row][mask[row] == 1], expected[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradients(side, gen):
    model, texts = model_of(gen), texts_of(gen)
    ids, mask = padded(texts, 12, side)
    got = model(ids, attention_mask=mask, labels=ids).loss  # also of labels that say nothing of the padding
    total = sum(model(text, labels=text).loss * (text.shape[1] - 1) for text in texts if text.shape[1] > 1)
    expected = total / (sum(LENGTHS) - len(LENGTHS))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    same = gradients(model, expected)
    for name, gradient in gradients(model, got).items():  # Transformers forms the loss in float32
        torch.testing.assert_close(gradient, same[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_masked_between_tokens_is_not_there(gen):
    model, text = model_of(gen), tokens_of(gen, 2, 12)
    mask = torch.ones(2, 12)
    mask[0, [0, 3, 4, 11]] = mask[1, 7:] = 0
    logits = model(text, attention_mask=mask, labels=text).logits
    for row in range(2):
        there = mask[row] == 1
        assert_close(logits[row][there], logits_of(model.decoder, text[row : row + 1, there])[0])
    kept = [text[row : row + 1, mask[row] == 1] for row in range(2)]
    losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in kept]
    expected = sum(losses) / (sum(row.shape[1] for row in kept) - 2)
    torch.testing.assert_close(model(text, attention_mask=mask, labels=text).loss, expected, rtol=1e-6, atol=0)


def test_rows_of_packed_documents_with_padding(gen):
    model, texts = model_of(gen), texts_of(gen)
    rows = [torch.cat(texts[:2], dim=1), torch.cat(texts[2:], dim=1)]
    ids, mask = padded(rows, 18)
    positions = torch.zeros_like(ids)
    positions[mask == 1] = torch.cat([torch.arange(length) for length in LENGTHS])
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(got[mask == 1], torch.cat([logits_of(model.decoder, text)[0] for text in texts]))


def test_a_row_without_tokens(gen):
    model, text = model_of(gen), tokens_of(gen, 2, 6)
    mask = torch.tensor([[0] * 6, [1] * 6])
    logits = model(text, attention_mask=mask, use_cache=True).logits
    assert (logits[0] == 0).all()
    assert_close(logits[1], logits_of(model.decoder, text[1:])[0])


ROW = torch.arange(6)[None]
REFUSED = {
    "a later start": ({"position_ids": ROW + 2}, "position_ids: got 'other positions'"),
    "positions that count padding": (
        {"position_ids": ROW, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        "position_ids: got 'other positions'",
    ),
    "a gap": ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}, "position_ids: got 'other positions'"),
    "positions of three kinds": ({"position_ids": ROW.expand(3, 1, 6)}, "position_ids: got"),
    "real positions": ({"position_ids": ROW.float()}, "position_ids: got 'torch.float32"),
    "disagreement": (
        {"position_ids": ROW, "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        r"seq_idx: got \[2, 4\], expected documents of \[6\] tokens, as position_ids says",
    ),
    "too short": ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, r"cu_seq_lens_q: got \[0, 2, 5\], expected integers"),
    "backwards": ({"cu_seq_lens_k": torch.tensor([0, 4, 2, 6])}, "cu_seq_lens_k: got"),
    "q and k": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])},
        "cu_seq_lens_k: got",
    ),
    "a length": ({"cu_seq_lens_q": torch.tensor([0, 2, 6]), "max_length_q": 3}, "max_length_q: got 3, expected at"),
    "a mask of documents": ({"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 2]])}, "attention_mask: got 'other"),
    "a mask of pairs": ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"attention_mask: got \[1, 1, 6, 6\]"),
    "a short mask": ({"attention_mask": torch.ones(1, 5)}, r"attention_mask: got \[1, 5\]"),
    "masks by name": ({"attention_mask": {"full_attention": None}}, "attention_mask: got 'dict'"),
    "no token": ({"attention_mask": torch.zeros(1, 6)}, "attention_mask: got 'only zeros'"),
    "a cache of documents": (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True},
        "use_cache: got 'packed documents'",
    ),
    "columns": ({"cache_position": torch.arange(1, 7)}, "cache_position: got 'other columns', expected integers 0"),
    "segment_ids": ({"segment_ids": ROW}, "segment_ids: got 'Tensor', expected no such argument"),
    "a slip of the pen": ({"atention_mask": ROW}, "atention_mask: got 'Tensor', expected no such argument"),
    "token_type_ids": ({"token_type_ids": ROW}, "token_type_ids: got 'Tensor'"),
    "attentions": ({"output_attentions": True}, "output_attentions: got 'bool', expected False"),
    "no causality": ({"is_causal": False}, "is_causal: got 'bool', expected True"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "input_ids: got 'both or none'"),
    "an id": ({"input_ids": ROW + 60}, "input_ids: got '60 to 65', expected 0 to 63"),
    "a negative id": ({"input_ids": ROW - 1}, "input_ids: got '-1 to 4'"),
    "a label": ({"labels": ROW + 60}, "labels: got '61 to 65', expected 0 to 63"),
    "a negative label": ({"shift_labels": ROW - 1}, "labels: got '-1 to 4'"),
    "labels of fewer tokens": ({"labels": ROW[:, 1:]}, r"labels: got 'torch.int64 \[1, 5\]'"),
    "a loss of few logits": ({"labels": ROW, "logits_to_keep": 2}, "logits_to_keep: got 2"),
    "real ids": ({"input_ids": ROW.float()}, r"input_ids: got 'torch.float32 \[1, 6\]', expected integers"),
    "a list of ids": ({"input_ids": ROW.tolist()}, "input_ids: got 'list', expected integers"),
    "real labels": ({"labels": ROW.float()}, "labels: got 'torch.float32"),
    "a list of positions": ({"position_ids": ROW.tolist()}, "position_ids: got 'list'"),
    "a list of documents": ({"cu_seq_lens_q": [0, 6]}, "cu_seq_lens_q: got 'list'"),
    "a list of columns": ({"cache_position": [*range(6)]}, "cache_position: got"),
    "narrow embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 6, 31)},
        r"inputs_embeds: got 'torch.float32 \[1, 6, 31\]', expected floats \[batch, tokens, 32\]",
    ),
    "columns from the front": ({"logits_to_keep": -1}, "logits_to_keep: got -1, expected a number of last columns"),
    "no columns": ({"logits_to_keep": None}, "logits_to_keep: got None"),
    "a column": ({"logits_to_keep": torch.tensor(1)}, "logits_to_keep: got tensor"),
    "a column that is not there": ({"logits_to_keep": torch.tensor([6])}, "logits_to_keep: got tensor"),
    "another cache": ({"cache": transformers.DynamicCache()}, "got 'DynamicCache', expected a RecurrentCache"),
    "two caches": ({"cache": RecurrentCache(), "past_key_values": RecurrentCache()}, "past_key_values: got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(case, gen):
    arguments, message = REFUSED[case]
    model = to_huggingface(new_decoder(gen, "linear", "L"))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ROW, **arguments})


def test_arguments_without_a_value_are_no_arguments(gen):
    model = to_huggingface(new_decoder(gen, "linear", "L"))
    model(ROW, output_attentions=False, head_mask=None, is_causal=True)
