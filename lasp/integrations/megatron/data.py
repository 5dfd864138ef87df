"""Batches from Megatron's own indexed datasets."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from lasp.config import require
from lasp.data.tokenizer import Tokenizer
from lasp.integrations.megatron.run import Run
from lasp.models.loss import require_ids


class _Vocabulary:
    """As much of a tokenizer as Megatron's datasets look at."""

    pad = -1  # marks the end of labels; no token

    def __init__(self, tokenizer: Tokenizer, name: str):
        self.vocab_size, self.eod = tokenizer.vocab_size, tokenizer.eod
        self.unique_identifiers = OrderedDict(name=name)


def build_dataset(run: Run, tokenizer: Tokenizer) -> GPTDataset:
    """Sequences of all documents one after the other, shuffled as Megatron does; enough for the whole run.

    Raises ValueError for files with a loss mask, which Megatron's data sets would not look at.
    """
    mask = Path(f"{run.data}.mask")
    require(
        not mask.exists(), "data", run.data, f"token files without a loss mask ({mask.name}), for Megatron's loader"
    )
    config = GPTDatasetConfig(
        random_seed=run.seed,
        sequence_length=run.sequence_length,
        blend=([run.data], None),
        split="1,0,0",
        tokenizer=_Vocabulary(tokenizer, run.tokenizer),
        path_to_cache=f"{run.run_dir}/index",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [run.steps * run.global_batch, None, None]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def order(dataset: GPTDataset) -> str:
    """What tells this order of sequences from others. A run of more steps has another one if it needs more epochs."""
    digest = hashlib.blake2b(digest_size=16)
    for index in (dataset.document_index, dataset.shuffle_index):
        digest.update(index.tobytes())
    return f"{len(dataset.shuffle_index)} sequences, hash {digest.hexdigest()}"


def micro_batches(
    dataset: GPTDataset, run: Run, step: int, rank: int, ranks: int, vocab_size: int
) -> Iterator[dict[str, Tensor]]:
    """The step's batches [micro_batch, sequence_length] of one data-parallel rank; the same after a restart.

    Raises ValueError for a token that is not in the vocabulary.
    """
    first = step * run.global_batch  # which no restart may change
    mine = range(first + rank * run.micro_batch, first + run.global_batch, ranks * run.micro_batch)
    for start in mine:
        samples = [dataset[index] for index in range(start, start + run.micro_batch)]
        names = ("tokens", "labels", "loss_mask", "position_ids")
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        for name in ("tokens", "labels"):
            require_ids(
                f"{name} of {run.data} in sequences {start} to {start + run.micro_batch - 1}", batch[name], vocab_size
            )
        yield batch
