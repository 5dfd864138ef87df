"""`generate` and its cache: unequal prompts, later turns, beams; what cannot be done is refused by name."""

import copy

import pytest
import torch

from tests.integrations.huggingface_models import logits_of, new_decoder, padded, tokens_of

transformers = pytest.importorskip("transformers")

from lasp.integrations.huggingface import CACHE, RecurrentCache, to_huggingface

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
every_model = pytest.mark.parametrize(
    ("mixer", "pattern"), [("gated_delta_net", "LLLN"), ("mamba2", "LN"), ("gla", "L"), ("log_linear_mamba2", "LN")]
)


def model_of(gen, mixer="gated_delta_net", pattern="LLLN"):
    return to_huggingface(new_decoder(gen, mixer, pattern)).double().eval()


def turn(model, ids, cache=None, **options):
    """One call of `generate`: the texts, and the cache that it leaves."""
    given = {} if cache is None else {CACHE: cache}
    out = model.generate(ids, **given, **{**GREEDY, "return_dict_in_generate": True, **options})
    return out.sequences, out[CACHE]


def assert_close(got, expected):
    assert (got - expected).abs().max() <= 1e-10


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}])
def test_unequal_prompts_go_on_as_each_alone(mixer, pattern, options, gen):
    model, texts = model_of(gen, mixer, pattern), [tokens_of(gen, 1, length) for length in (3, 10, 6)]
    ids, mask = padded(texts, 10)
    out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(out[:, :10], ids)
    for row, text in enumerate(texts):
        alone = model.generate(text, **GREEDY, **({"num_beams": 3} if "num_beams" in options else {}))
        assert torch.equal(out[row, 10:], alone[0, text.shape[1] :])


@every_model
def test_a_second_turn_goes_on_from_the_first_ones_cache(mixer, pattern, gen):
    model, prompt = model_of(gen, mixer, pattern), tokens_of(gen, 2, 9)
    sequences, cache = turn(model, prompt)
    assert cache.get_seq_length() == 13
    more = torch.cat([sequences, tokens_of(gen, 2, 3)], dim=1)
    fresh, _ = turn(model, more)
    again, cache = turn(model, more, cache)
    assert torch.equal(again, fresh)
    last = model(again[:, -1:], **{CACHE: cache}).logits
    assert_close(last[:, 0], logits_of(model.decoder, again)[:, -1])


@every_model
def test_turns_of_unequal_prompts(mixer, pattern, gen):
    model, texts = model_of(gen, mixer, pattern), [tokens_of(gen, 1, length) for length in (2, 8)]
    ids, mask = padded(texts, 8)
    sequences, cache = turn(model, ids, attention_mask=mask)
    new, new_mask = padded([tokens_of(gen, 1, 1), tokens_of(gen, 1, 4)], 4)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype), new_mask], dim=1)
    # The token that was generated last has not been seen: it comes with the new ones.
    logits = model(torch.cat([sequences[:, -1:], new], dim=1), attention_mask=mask, **{CACHE: cache}).logits
    whole = torch.cat([sequences, new], dim=1)
    for row in range(2):
        assert_close(logits[row, -1], logits_of(model.decoder, whole[row : row + 1, mask[row] == 1])[0, -1])
    assert cache.get_seq_length() == 17
    assert torch.equal(cache.seen, mask == 1)


def test_rows_of_a_cache_are_copied_and_chosen(gen):
    """A prompt that several texts begin with is read once."""
    model, texts = model_of(gen), [tokens_of(gen, 1, length) for length in (4, 7)]
    ids, mask = padded(texts, 7)
    with torch.no_grad():
        for ids_, mask_, of in ((ids[1:], None, (0, 0, 0)), (ids, mask, (0, 0, 1, 1)), (ids[:1], mask[:1], (0, 0))):
            cache = RecurrentCache()
            model(ids_, attention_mask=mask_, **{CACHE: cache})
            before = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(of) // len(ids_))
            new = tokens_of(gen, len(of), 2)
            for chosen in (slice(None), [len(of) - 1]):
                cache.batch_select_indices(torch.arange(len(of))[chosen])
                assert cache.batch_size == len(torch.arange(len(of))[chosen])
                got = model(new[chosen], **{CACHE: copy.deepcopy(cache)}).logits
                for logits, row, tail in zip(got, torch.tensor(of)[chosen], new[chosen], strict=True):
                    text = ids_[row] if mask_ is None else ids_[row][mask_[row] == 1]
                    assert_close(logits, logits_of(model.decoder, torch.cat([text, tail])[None])[0, -2:])
            assert (before.batch_size, before.get_seq_length()) == (len(ids_), 7)
            before.reset()
            assert (before.batch_size, before.get_seq_length(), len(before)) == (-1, 0, 0)
            assert_close(model(ids_, attention_mask=mask_, **{CACHE: before}).logits, model(ids_, mask_).logits)


def test_embeddings_in_place_of_a_prompt(gen):
    model, texts = model_of(gen), [tokens_of(gen, 1, length) for length in (4, 7)]
    ids, mask = padded(texts, 7)
    x = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=x, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    got = model.generate(inputs_embeds=x, attention_mask=mask, **GREEDY)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, **GREEDY)[:, 7:])


def test_sampling_several_texts_of_a_prompt(gen):
    model = model_of(gen)
    out = model.generate(tokens_of(gen, 1, 5), **{**GREEDY, "do_sample": True}, num_return_sequences=3)
    assert out.shape == (3, 10)
    assert len(set(map(tuple, out.tolist()))) > 1


def test_only_the_last_logits_are_computed(gen, monkeypatch):
    model, text = model_of(gen), tokens_of(gen, 2, 9)
    whole = model(text).logits
    assert_close(model(text, logits_to_keep=2).logits, whole[:, -2:])
    assert_close(model(text, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    rows, logits = [], type(model.decoder).logits
    monkeypatch.setattr(type(model.decoder), "logits", lambda self, x: (rows.append(x.shape[1]), logits(self, x))[1])
    model.generate(text, **GREEDY)
    assert rows == [1] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "itself"}, "assisted generation is not supported"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.1}, "Group Beam Search requires"),
        ({"dola_layers": "low"}, "Dola Generation requires"),
        ({"cache_implementation": "static"}, "cache_implementation: got 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation: got 'quantized'"),
        ({CACHE: transformers.DynamicCache()}, "got 'DynamicCache', expected a RecurrentCache"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "attention_mask: got 'padding on the right'"),
        ({"segment_ids": torch.ones(2, 4)}, "segment_ids"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_generate_cannot_do_is_refused_by_name(options, message, gen):
    model = model_of(gen, "linear", "L")
    options = {**options, **({"assistant_model": model} if "assistant_model" in options else {})}
    with pytest.raises(ValueError, match=message):
        model.generate(tokens_of(gen, 2, 4), **{**GREEDY, **options})


def test_it_assists_nobody(gen):
    shape = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=1))
    with pytest.raises(ValueError, match="assistant_model: got 'LaspForCausalLM'"):
        llama.generate(tokens_of(gen, 1, 4), assistant_model=model_of(gen, "linear", "L"), **GREEDY)


def test_continuous_batching_is_refused(gen):
    with pytest.raises(ValueError, match="init_continuous_batching: got a call, expected none"):
        model_of(gen, "linear", "L").generate_batch([[1, 2, 3]])


def test_caches_that_do_not_fit_are_refused(gen):
    model, (ids, mask) = model_of(gen), padded([tokens_of(gen, 1, 3), tokens_of(gen, 1, 5)], 5)
    sequences, cache = turn(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="position_ids: got 'other positions'"):
        turn(model, torch.cat([sequences, ids], dim=1), cache)
    with pytest.raises(ValueError, match="attention_mask: got 'another mask than the cache has seen'"):
        model(sequences[:, -1:], attention_mask=torch.ones(2, 10), **{CACHE: cache})
    with pytest.raises(ValueError, match=f"{CACHE}: got '2 rows', expected 1"):
        model(ids[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match="position_ids: got 'other positions'"):
        model(ids[:, :1], position_ids=torch.zeros(2, 1, dtype=torch.int64), **{CACHE: cache})
    with pytest.raises(ValueError, match="cache: got a call of crop"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cache: got a call of update"):
        cache.update(None, None, 0)
    with pytest.raises(ValueError, match="cache: got a call of activate_past_recording"):
        cache.activate_past_recording()
    cache.crop(0)
