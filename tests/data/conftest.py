"""What several of the data tests need."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lasp.data import TokenFileWriter


@pytest.fixture
def prefix(tmp_path, documents):
    """Of token files with the documents, a fixture of each module that asks for it."""
    with TokenFileWriter(tmp_path / "data", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return tmp_path / "data"


@pytest.fixture
def hugging_face_file():
    """Writes a byte-level BPE tokenizer.json, trained on a line of code, and returns its path."""

    def write(path, eod="<|endoftext|>"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[eod],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["def f(x):\n    return 'Größe 数'\n"] * 4, trainer)
        tokenizer.enable_truncation(max_length=4)  # as many published files have it
        tokenizer.save(str(path))
        return path

    return write
