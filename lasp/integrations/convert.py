"""Weights between training runs and Hugging Face directories: what `lasp export` and `lasp import` do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lasp.config import require
from lasp.data import load_tokenizer
from lasp.integrations.huggingface import LaspForCausalLM, to_huggingface
from lasp.integrations.huggingface.tokenizer import export_tokenizer
from lasp.integrations.llama import from_llama, to_llama
from lasp.integrations.output import new_directory
from lasp.models import Decoder, count_parameters
from lasp.training import checkpoint
from lasp.training.paths import tokenizer_of


def export_run(run_dir: str, output: str, *, as_llama: bool = False) -> str:
    """Writes the last checkpoint of a run to the directory `output`, with its tokenizer; returns a line about it.

    The weights are those that were trained, in their dtype; as a Llama if asked for. Raises ValueError if `output` is
    neither new nor an empty directory, for a missing or damaged checkpoint, and as `to_llama` does.
    """
    with new_directory(output) as folder:
        path = checkpoint.require_latest(run_dir)
        config = checkpoint.read_config(path)
        decoder = checkpoint.read_model(path, config, Decoder)
        name = tokenizer_of(run_dir, config)
        eod, tokenizer = load_tokenizer(name).eod, export_tokenizer(name)
        ends = list(dict.fromkeys((eod, tokenizer.eos_token_id)))  # of documents, as trained, and of a chat's turns
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": tokenizer.pad_token_id,
        }
        model: Any = to_llama(decoder, **special) if as_llama else to_huggingface(decoder, **special)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return f"{output}: {count_parameters(decoder.config):,} parameters of {path}"


def import_weights(source: str, output: str, linear: Mapping[str, Any], *, seed: int) -> str:
    """Writes the weights of a Hugging Face directory to `output`, for TrainConfig.initial_weights.

    A Llama's layers become what `linear` says (see `llama_shape`), what it has no weights for being drawn with the
    seed. Returns the option of `lasp train` that takes them. Raises ValueError if `output` is neither new nor an empty
    directory, and as `read_model` does.
    """
    with new_directory(output) as folder:
        model = read_model(source)
        torch.manual_seed(seed)
        decoder = model.decoder if isinstance(model, LaspForCausalLM) else from_llama(model, **linear)
        # A run keeps at least float32 weights, whatever it computes in.
        decoder.to(torch.promote_types(model.dtype, torch.float32))
        checkpoint.save_weights(folder, decoder)
    return f"--initial-weights {output}"


def read_model(source: str) -> Any:
    """The model in a Hugging Face directory, lasp's or a Llama.

    Raises ValueError if it is not such a directory (nothing is downloaded), and for other models.
    """
    expected = "a directory with a config.json (of a model on the hub: hf download NAME --local-dir DIRECTORY)"
    require((Path(source) / "config.json").is_file(), "source", source, expected)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    require(config.model_type in ("lasp", "llama"), "model_type", config.model_type, "lasp or llama")
    return AutoModelForCausalLM.from_pretrained(source, local_files_only=True)


def read_llama(source: str) -> Any:
    """The same as a Llama; ValueError if there are linear layers."""
    model = read_model(source)
    return to_llama(model.decoder) if isinstance(model, LaspForCausalLM) else model
