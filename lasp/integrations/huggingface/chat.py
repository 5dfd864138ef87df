"""Conversations through the chat template of a Hugging Face tokenizer."""

import re
from typing import Any

import numpy as np

from lasp.config import require
from lasp.integrations.huggingface.tokenizer import export_tokenizer

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\b")  # a template that says itself what the assistant's words are


class HuggingFaceChat:
    """A `lasp.data.conversations.ChatTemplate`: that of a tokenizer.json's directory, through Transformers."""

    def __init__(self, tokenizer: str):
        self._tokenizer = export_tokenizer(tokenizer)
        template = self._tokenizer.chat_template
        expected = "a tokenizer's directory with a chat template (tokenizer_config.json, chat_template.jinja)"
        require(template is not None, "tokenizer", tokenizer, expected)
        self._marked = isinstance(template, str) and MARKED.search(template) is not None

    def encode(
        self, messages: list[dict[str, Any]], prompt: int | None, tools: list[Any] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if prompt is None and self._marked:
            encoded = self._apply(messages, tools, tokenize=True, return_assistant_tokens_mask=True)
            return np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], np.uint8)
        text = self._apply(messages, tools, tokenize=False)
        spans = self._assistant_spans(messages, tools, text) if prompt is None else []
        if prompt is not None:
            spans = [(self._prefix(messages[:prompt], tools, text, True), len(text))]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
        learnt = [(first <= starts) & (starts < stop) for first, stop in spans]
        return np.array(encoded["input_ids"], np.int32), np.any([np.zeros(len(starts), bool), *learnt], axis=0)

    def _assistant_spans(self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str) -> list[tuple]:
        """The characters from where the assistant is to speak to where its turn has ended, for each of its turns."""
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        return [
            (self._prefix(messages[:turn], tools, text, True), self._prefix(messages[: turn + 1], tools, text, False))
            for turn in turns
        ]

    def _prefix(self, messages: list[dict[str, Any]], tools: list[Any] | None, text: str, prompt: bool) -> int:
        """How many characters of the whole text these messages are, with the assistant's prompt after them."""
        if not messages:
            return 0
        begin = self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt)
        if not text.startswith(begin):
            raise ValueError(
                f"chat template: got another text for the first {len(messages)} messages alone than within the whole, "
                "expected the same, or a template with {% generation %} around what the assistant says"
            )
        return len(begin)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # templates raise errors of their own, and Jinja's
            raise ValueError(f"messages: got {error}, expected what the chat template takes") from error
