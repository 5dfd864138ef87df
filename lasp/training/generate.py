"""Text from a checkpoint: the prompt in one pass, then token by token with the model's memory of what came before."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lasp.config import ModelConfig, require
from lasp.data import load_tokenizer
from lasp.models import Decoder, Memory, make_model
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.paths import tokenizer_of

PREFILL_TOKENS = 4096  # at a time, so that a long prompt's activations never exist whole


def generate(
    run_dir: str, prompt: str, tokens: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
) -> Iterator[str]:
    """Yields the text that goes on from the prompt, piece by piece, up to `tokens` tokens or the document's end.

    Uses the last checkpoint of run_dir, in the run's dtype, on one device. temperature 0 takes the likeliest token;
    otherwise `sample` draws. Raises ValueError for a prompt without tokens, settings out of range, a missing or damaged
    checkpoint; FileNotFoundError if the tokenizer is gone.
    """
    require(tokens >= 1, "tokens", tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
    path = checkpoint.require_latest(run_dir)
    config = checkpoint.read_config(path)
    tokenizer = load_tokenizer(tokenizer_of(run_dir, config))
    prompt_ids = tokenizer.encode(prompt)
    require(len(prompt_ids) >= 1, "prompt", prompt, "at least one token")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(ModelConfig(**config["model"])).to(device, getattr(torch, config["dtype"]))
    own = config["model"].get("model_class")
    require(isinstance(model, Decoder), "model_class", own, "a class derived from lasp.models.Decoder, for its memory")
    checkpoint.load_model(path, model)
    generator = torch.Generator(device).manual_seed(seed)
    memory, incoming = Memory(), torch.from_numpy(prompt_ids).to(device, torch.int64)
    ids: list[int] = []
    printed = 0
    for _ in range(tokens):
        logits = advance(model, incoming, memory)
        incoming = choose(logits[: tokenizer.vocab_size], temperature=temperature, top_p=top_p, generator=generator)
        if (token := int(incoming)) == tokenizer.eod:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's bytes are still to come
            yield text[printed:]
            printed = len(text)


@torch.inference_mode()
def advance(model: Decoder, tokens: Tensor, memory: Memory) -> Tensor:
    """Feeds tokens [T] to a model; returns the logits [vocabulary] of the token after them. Updates the memory."""
    *parts, last = tokens.split(PREFILL_TOKENS)
    for part in parts:
        model.remember(part[None], SequenceParallel(None).sequence(len(part)), memory)
    return model(last[None], SequenceParallel(None).sequence(len(last)), memory=memory)[0, -1]


def choose(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token id [1] from logits [vocabulary]: the likeliest (temperature 0) or one of the nucleus, arXiv:1904.09751.

    The nucleus: the smallest set of likeliest tokens whose probabilities, after the temperature, together reach top_p.
    """
    if temperature == 0:
        return logits.argmax(keepdim=True)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return ids[torch.multinomial(probabilities.where(before < top_p, 0), 1, generator=generator)]
