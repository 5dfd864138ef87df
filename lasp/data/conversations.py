"""Conversations become tokens and a mask: what the assistant says is to be learnt, all else is only read.

    {"prompt": "…", "completion": "…"}                      texts as they are; the completion is learnt
    {"messages": [{"role": "…", "content": "…"}, …]}        through a chat template; the assistant's turns are learnt
    {"prompt": [messages], "completion": [messages]}        likewise; the completion is learnt

Messages may come with "tools", as templates take them. All end with the tokenizer's end-of-document token, which is
learnt if the token before it is.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from lasp.config import require
from lasp.data.documents import Conversation, Skipped
from lasp.data.tokenizer import Tokenizer

MESSAGES = 'a list of messages, {"role": "…", "content": …}, at least one'


class ChatTemplate(Protocol):
    """What turns messages into tokens as the model will read them in a chat."""

    def encode(
        self, messages: list[dict[str, Any]], prompt: int | None, tools: list[Any] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids [tokens] and mask [tokens]: 1 for what follows the first `prompt` messages, or for all turns of the
        assistant's if that is None. Raises ValueError for messages that the template does not take."""
        ...


def encode_conversations(
    tokenizer: Tokenizer,
    template: Callable[[], ChatTemplate],
    conversations: Iterable[tuple[Any, Conversation]],
    skipped: Skipped,
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """(key, ids [tokens], mask [tokens]) for every (key, conversation) in which there is something to learn.

    `template` is asked for when the first messages come. Raises ValueError naming file and line or row for a record
    that is none of the above.
    """
    for key, conversation in conversations:
        where = conversation.where
        try:
            ids, mask = _encode(tokenizer, template, conversation.record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not (ids.size and ids[-1] == tokenizer.eod):
            ids, mask = np.append(ids, tokenizer.eod), np.append(mask, mask[-1:].any())
        if mask[1:].any():
            yield key, ids, mask
        else:
            skipped.add("records with nothing to learn: no completion, or no turn of an assistant's", where)


def _encode(
    tokenizer: Tokenizer, template: Callable[[], ChatTemplate], record: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    tools = record.get("tools")
    require(tools is None or isinstance(tools, list), "tools", tools, "a list")
    if "messages" in record:
        messages = _messages("messages", record["messages"])
        return template().encode(messages, None, tools)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        parts = tokenizer.encode(prompt), tokenizer.encode(completion)
        return np.concatenate(parts), np.repeat(np.array([0, 1], np.uint8), [len(part) for part in parts])
    both = [*_messages("prompt", prompt), *_messages("completion", completion)]
    return template().encode(both, len(prompt), tools)


def _messages(field: str, value: object) -> list[dict[str, Any]]:
    expected = MESSAGES if field == "messages" else f"a text, as the other field, or {MESSAGES}"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field}: got {str(value)[:80]!r}, expected {expected}")
    for message in value:
        named = isinstance(message, dict) and isinstance(message.get("role"), str)
        require(named, field, str(message)[:80], expected)
    return value
