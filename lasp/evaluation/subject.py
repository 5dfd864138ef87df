"""A model that is evaluated, whole on every rank, and how contexts are given to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import DataConfig, ParallelConfig, from_dict, require
from lasp.data import Context, Tokenizer, load_tokenizer
from lasp.evaluation.score import Scores, score
from lasp.models import Decoder
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.batches import Batch, read_batches, share
from lasp.training.paths import TOKENIZER_FILE, tokenizer_of
from lasp.training.runtime import World, sequence_parallel
from lasp.training.together import together

EXPORT_FILE = "config.json"


@dataclass(frozen=True)
class Trained:
    """A model as it was found. data, context_length: what a run was trained on, None for an export."""

    decoder: Decoder
    tokenizer: str
    eod: str | None  # the name of the tokenizer's end-of-document token, if it has to be told
    dtype: torch.dtype
    data: DataConfig | None = None
    context_length: int | None = None


def read_model(path: str) -> Trained:
    """The last checkpoint of a run, or a checkpoint; or the model in a Hugging Face directory, lasp's or a Llama.

    Raises ValueError for a directory with neither, or a damaged checkpoint.
    """
    is_run = checkpoint.is_checkpoint(path) or checkpoint.latest(path) is not None
    if not is_run and (Path(path) / EXPORT_FILE).is_file():
        return _read_export(path)
    step = checkpoint.require_latest(path)
    config = checkpoint.read_config(step)
    decoder = checkpoint.read_model(step, config)
    data, dtype = from_dict(DataConfig, config["data"]), getattr(torch, config["dtype"])
    return Trained(decoder, tokenizer_of(path, config), None, dtype, data, config["context_length"])


def _read_export(path: str) -> Trained:
    found = find_spec("transformers") is not None
    require(found, "transformers", "nothing of that name", f"it, to read {path}: pip install 'lasp-sp[huggingface]'")
    from transformers import AutoTokenizer

    from lasp.integrations.convert import read_model as read_huggingface
    from lasp.integrations.huggingface import LaspForCausalLM
    from lasp.integrations.llama import from_llama

    model = read_huggingface(path)
    decoder = model.decoder if isinstance(model, LaspForCausalLM) else from_llama(model)
    end = model.config.eos_token_id
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    eod = tokenizer.convert_ids_to_tokens(end[0] if isinstance(end, list) else end)
    return Trained(decoder, str(Path(path) / TOKENIZER_FILE), eod, model.dtype)


@dataclass(frozen=True)
class Subject:
    """The model, in evaluation mode, and the ranks that it is evaluated on."""

    model: Decoder
    sp: SequenceParallel
    world: World
    origin: Trained

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises FileNotFoundError if it is gone, ValueError if it has ids that the model does not know."""
        tokenizer = load_tokenizer(self.origin.tokenizer, eod=self.origin.eod)
        known = self.model.config.vocab_size
        require(
            tokenizer.vocab_size <= known, "tokenizer", f"{tokenizer.vocab_size} ids", f"at most the model's {known}"
        )
        return tokenizer

    def scores(self, contexts: Iterable[Context]) -> Iterator[tuple[Batch, Scores]]:
        """Those of this rank's labels, context after context of its data-parallel group. All ranks iterate together.

        Raises ValueError on every rank if one of them reads a token that is not in the vocabulary.
        """
        rest = iter(contexts)
        while group := list(islice(rest, self.world.mesh["dp"].size())):
            for batch in read_batches(share(group, self.world), self.sp, self.world):
                tokens, labels = batch.tokens.to(self.world.device), batch.labels.to(self.world.device)
                yield batch, score(self.model, tokens, labels, batch.seq)


def open_subject(path: str, world: World, parallel: ParallelConfig, dtype: str | None = None) -> Subject:
    """The model at `path` (see `read_model`) on every rank, in its own dtype if no other is given.

    What one rank cannot read is an error on every rank.
    """
    found: list[Trained] = []
    together(dist.group.WORLD, lambda: found.append(read_model(path)))
    (origin,) = found
    if dtype is not None:
        origin = replace(origin, dtype=getattr(torch, dtype))
    sp = sequence_parallel(parallel, origin.decoder.config, world)
    if origin.dtype == torch.float64:
        origin.decoder.double()  # before it is moved: constants are kept in float32 at least
    return Subject(origin.decoder.to(world.device, origin.dtype).eval(), sp, world, origin)
