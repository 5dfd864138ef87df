"""What several of the data tests need."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


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
