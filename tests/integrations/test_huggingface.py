"""Weights that go to Hugging Face and back are the same bits, and the models compute the same."""

from dataclasses import replace

import pytest
import torch

from lasp.config import MIXERS
from lasp.models import Decoder, Memory, tiny
from lasp.parallel import SequenceParallel
from tests.integrations.huggingface_models import assert_same_weights, logits_of, new_decoder, tokens_of

transformers = pytest.importorskip("transformers")

from lasp.integrations.huggingface import LaspConfig, LaspForCausalLM, to_huggingface
from lasp.integrations.llama import from_llama, llama_shape, to_llama


def new_llama(gen, **changes):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **heads, **rope, **changes})).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=gen) / 10)
    return llama


@pytest.mark.parametrize("mixer", MIXERS)
def test_saved_and_loaded_by_the_auto_class(mixer, gen, tmp_path):
    decoder = new_decoder(gen, mixer)
    to_huggingface(decoder, eos_token_id=3).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(loaded, LaspForCausalLM)
    assert loaded.config.shape == decoder.config
    assert loaded.config.num_hidden_layers == 4
    assert loaded.config.eos_token_id == 3
    assert_same_weights(loaded.decoder.state_dict(), decoder.state_dict())
    assert dict(loaded.named_buffers()).keys() == {f"decoder.{name}" for name, _ in decoder.named_buffers()}
    tokens = tokens_of(gen, 2, 37)
    assert torch.equal(loaded(tokens).logits, logits_of(decoder, tokens))


def test_untied_embeddings_stay_so(gen, tmp_path):
    decoder = new_decoder(gen, tie_embeddings=False)
    to_huggingface(decoder).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded.decoder.state_dict(), decoder.state_dict())


def test_a_half_models_decays_are_not_rounded(gen, tmp_path):
    decoder = new_decoder(gen, "retention")
    decays = [buffer.clone() for buffer in decoder.buffers()]
    to_huggingface(decoder.bfloat16()).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert decays
    for got, expected in zip(loaded.buffers(), decays, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("lacking", [("A_log", "dt_bias"), ("A_log",), ("dt_bias",)])
def test_parameters_that_a_checkpoint_lacks_are_initialised(lacking, gen, tmp_path):
    decoder = new_decoder(gen)
    state = {f"decoder.{n}": p for n, p in decoder.state_dict().items() if not n.endswith(lacking)}
    to_huggingface(decoder).save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).decoder
    for name, parameter in loaded.named_parameters():
        if not name.endswith(lacking):
            assert torch.equal(parameter, decoder.get_parameter(name))
        elif name.endswith("A_log"):
            assert parameter.min() > 0
            assert parameter.max() <= torch.tensor(16.0).log()
        else:
            dt = torch.nn.functional.softplus(parameter)
            assert dt.min() >= 0.0009 and dt.max() <= 0.11


def test_a_new_model_begins_as_lasps_own():
    config = LaspConfig.of(replace(tiny("gated_delta_net", "LN"), hidden_size=96, init_std=0.5, tie_embeddings=False))
    own = Decoder(config.shape)
    for name, parameter in transformers.AutoModelForCausalLM.from_config(config).decoder.named_parameters():
        if parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(own.get_parameter(name).std().item(), rel=0.2), name


def test_transformers_names_of_a_configurations_fields():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "pattern": "N"}
    theirs = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    shape = LaspConfig(**sizes, **theirs).shape
    assert [shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.tie_embeddings] == [3, 4, 2, False]
    with pytest.raises(ValueError, match="num_hidden_layers: got 3, expected 4, as num_layers says"):
        LaspConfig(**sizes, **theirs, num_layers=4)
    with pytest.raises(ValueError, match="missing 2 required keyword-only arguments: 'num_layers' and 'num_heads'"):
        LaspConfig(**sizes)


@pytest.mark.parametrize("mixer", ["retention", "lightning"])
def test_decays_in_float64_are_those_of_a_model_that_was_made_so(mixer, gen, tmp_path):
    decoder = new_decoder(gen, mixer, "L", num_heads=3, hidden_size=33).double()
    to_huggingface(decoder).save_pretrained(tmp_path)
    loaded, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens_of(gen, 1, 9)
    assert torch.equal(loaded(tokens).logits, logits_of(decoder, tokens))


@pytest.mark.parametrize(("mixer", "pattern"), [("gated_delta_net", "LLLN"), ("mamba2", "LN"), ("gla", "L")])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generate_agrees_with_the_whole_sequence(mixer, pattern, options, gen):
    model = to_huggingface(new_decoder(gen, mixer, pattern)).double().eval()
    prompt = tokens_of(gen, 2, 11)
    plain = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    out = model.generate(prompt, **plain, **options)
    assert out.shape == (2, 17)
    assert torch.equal(out[:, :11], prompt)
    if "num_beams" in options:
        assert torch.equal(out, model.generate(prompt, use_cache=False, **plain, **options))
    else:
        assert torch.equal(logits_of(model.decoder, out)[:, 10:-1].argmax(-1), out[:, 11:])


def test_loss_is_that_of_the_labels_shifted(gen):
    decoder = new_decoder(gen)
    tokens = tokens_of(gen, 2, 23)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=gen) < 0.3, -100)
    loss = to_huggingface(decoder)(tokens, labels=labels).loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total, count = decoder(tokens, SequenceParallel(None).sequence(23), labels=shifted)
    torch.testing.assert_close(loss, total / count)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="num_layers: got 3"):
        LaspConfig(vocab_size=8, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=8)


def test_mixtures_of_experts_are_refused():
    decoder = Decoder(replace(tiny(), num_experts=4))
    with pytest.raises(ValueError, match="num_experts: got 4, expected 0: mixtures of experts are not exchanged"):
        to_huggingface(decoder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_softmax_decoder_is_the_llama(kv_heads, tied, gen, tmp_path):
    llama = new_llama(gen, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    decoder = from_llama(llama)
    tokens = tokens_of(gen, 2, 41)
    torch.testing.assert_close(logits_of(decoder, tokens), llama(tokens).logits, rtol=1e-4, atol=1e-4)
    to_llama(decoder).save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(back.state_dict(), llama.state_dict())
    assert torch.equal(back.eval()(tokens).logits, llama(tokens).logits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_layers_take_the_llamas_projections(mixer, gen):
    """The projections of a linear layer, as it splits them, are the Llama's heads."""
    llama = new_llama(gen)
    decoder = from_llama(llama, pattern="LLLN", mixer=mixer)
    weights = llama.state_dict()
    x = torch.randn(3, 32, generator=gen)
    for layer in range(3):
        q, k, v = (x @ weights[f"model.layers.{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (y.unflatten(-1, (-1, 8)) for y in (q, k, v))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        block = decoder.layers[layer].mixer
        if "mamba2" in mixer:
            inner, *_ = block.xbc_proj(x).split(block.sizes, dim=-1)
            torch.testing.assert_close(inner.unflatten(-1, (4, 8)), v)
        else:
            parts = block.qkv_proj(x).unflatten(-1, (4, -1)).split(block.sizes, dim=-1)
            k, v = (y.repeat(1, 1, decoder.config.steps) for y in (k, v))
            for got, expected, name in zip(parts, (q, k, v), "qkv", strict=True):
                if (mixer, name) == ("hgrn2", "k"):
                    assert not torch.allclose(got, expected, atol=0.1)
                else:
                    torch.testing.assert_close(got, expected)
        out = block.out_proj if "mamba2" in mixer else block.output.out_proj
        assert torch.equal(out.weight, weights[f"model.layers.{layer}.self_attn.o_proj.weight"])
    assert logits_of(decoder, tokens_of(gen, 1, 19)).isfinite().all()


def test_a_window_is_the_llamas_attention(gen):
    """As far as it reaches, and where the linear mixer adds nothing."""
    llama = new_llama(gen)
    decoder, tokens = from_llama(llama, pattern="L", mixer="gla", window=9), tokens_of(gen, 1, 9)
    for block in decoder.layers:
        torch.nn.init.zeros_(block.mixer.linear.output.out_proj.weight)
        torch.nn.init.zeros_(block.mixer.window.gate_proj.weight)
    torch.testing.assert_close(logits_of(decoder, tokens), llama(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: got 'linear'"),
    ],
)
def test_llamas_that_lasp_cannot_express_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        llama_shape(transformers.LlamaConfig(**changes))


def test_a_scaled_rope_does_not_matter_where_nothing_rotates():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert llama_shape(transformers.LlamaConfig(rope_parameters=rope), pattern="L", mixer="gla").layers == "L" * 32


def test_a_linear_decoder_is_no_llama(gen):
    with pytest.raises(ValueError, match="mixer: got 'own:Mixer', expected one of lasp's"):
        llama_shape(transformers.LlamaConfig(), pattern="L", mixer="own:Mixer")
    with pytest.raises(ValueError, match="pattern: got 'LLLN'"):
        to_llama(new_decoder(gen))
    with pytest.raises(ValueError, match="rope_theta: got None, expected a number: a Llama has RoPE"):
        to_llama(new_decoder(gen, pattern="N", rope_theta=None))
    with pytest.raises(ValueError, match="num_experts: got 4, expected 0: a Llama has no experts"):
        to_llama(new_decoder(gen, pattern="N", num_experts=4))


def test_the_cache_is_lasps_memory(gen):
    decoder = new_decoder(gen)
    tokens = tokens_of(gen, 2, 9)
    cache = to_huggingface(decoder)(tokens, use_cache=True).past_key_values
    assert isinstance(cache, Memory)
    assert cache.get_seq_length() == 9
