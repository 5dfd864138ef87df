"""lasp's models for lm-evaluation-harness (the package lm_eval), as the model "lasp".

    python -m lasp.evaluation.harness run --model lasp --model_args path=runs/try --tasks lambada_openai --batch_size 8

and all else as with the command lm_eval, whose command line this is. From Python: lm_eval.simple_evaluate(model=
HarnessModel("runs/try"), tasks=[...]).

Texts of a batch stand one behind the other as packed documents, or as rows of a memory, so that unequal lengths need no
padding and a batch gives what each text gives alone. Under torchrun all ranks share each text.
"""

import atexit
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lasp.config import require
from lasp.evaluation.config import Evaluation
from lasp.evaluation.likelihood import log_likelihoods
from lasp.evaluation.subject import open_subject
from lasp.evaluation.writing import write, write_greedily
from lasp.training.generate import choose
from lasp.training.runtime import join_world

NEW_TOKENS = 256  # of a continuation, if a task does not say


@register_model("lasp")
class HarnessModel(TemplateLM):
    """A run's directory, one that `lasp export` wrote, or a Llama's.

    Args:
        path: that directory.
        batch_size: texts that are read together.
        max_length: tokens that the model reads; of longer contexts the beginning is cut off, and texts that are scored
            whole are read in windows. None: nothing is cut off.
        dtype, layout, softmax: those of `lasp eval`.
        device: "cpu" or "cuda"; what there is if None.
        seed: of sampling.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 1,
        max_length: int | None = None,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,  # the harness gives it to every model
        **options: Any,
    ):
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 0
        require(self.batch_size >= 1, "batch_size", batch_size, "a number of texts of at least 1")
        require(max_length is None or max_length >= 2, "max_length", max_length, "at least 2, or None")
        kind = "auto" if device is None else device.partition(":")[0]
        evaluation = Evaluation(model=path, device=kind, **options)  # type: ignore[arg-type]  # which is checked there
        world = _until_the_end.enter_context(join_world(evaluation))
        self.subject = open_subject(path, world, evaluation.parallel, evaluation.dtype)
        self.max_length, self._device = max_length, world.device
        self.generator = torch.Generator(world.device).manual_seed(seed)

    @property
    def tokenizer_name(self) -> str:
        return self.subject.origin.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.subject.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self._cut(context, len(continuation) - 1), continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # of an empty continuation
        numbers = [number for number, (_, continuation) in enumerate(pairs) if continuation]
        for batch in self._batches(numbers, lambda number: sum(map(len, pairs[number])), disable_tqdm):
            results = log_likelihoods(self.subject, [pairs[number] for number in batch])
            for number, result in zip(batch, results, strict=True):
                found[number] = result
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            longest = len(ids) if self.max_length is None else self.max_length
            for window in get_rolling_token_windows(ids, self.eot_token_id, max(1, longest), 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedily, or with do_sample by temperature and top_p. Raises ValueError for other options."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            options = requests[numbers[0]].args[1]
            for batch in self._batches(numbers, lambda number: len(requests[number].args[0]), disable_tqdm):
                written = self._write([requests[number].args[0] for number in batch], options)
                for number, text in zip(batch, written, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _write(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        asked = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        until = [stop for stop in handle_stop_sequences(asked.pop("until", None), eos=None) if stop]
        room, sampled = asked.pop("max_gen_toks"), asked.pop("do_sample", False)
        temperature, top_p = asked.pop("temperature", 0.0), asked.pop("top_p", 1.0) or 1.0
        require(not asked, "generation", asked, "until, max_gen_toks, do_sample, temperature and top_p alone")
        one = self.subject.sp.size == 1
        require(one or not sampled, "do_sample", sampled, f"False on {self.subject.sp.size} ranks")
        prompts = [self._cut(self.tok_encode(text), room) or [self.eot_token_id] for text in contexts]
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)

        def take(row: int, token: int) -> bool:
            if token == self.eot_token_id:
                return False
            written[row].append(token)
            text = self.subject.tokenizer.decode(written[row])
            ends = [place for stop in until if (place := text.find(stop)) >= 0]
            texts[row] = text[: min(ends)] if ends else text
            return not ends and len(written[row]) < room

        def sample(logits: torch.Tensor) -> torch.Tensor:
            settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "generator": self.generator}
            return torch.cat([choose(row, **settings) for row in logits])

        ids = [np.array(prompt, np.int64) for prompt in prompts]
        if sampled:
            write(self.subject.model, ids, take, sample)
        else:
            write_greedily(self.subject, ids, take)
        return texts

    def _cut(self, context: list[int], room: int) -> list[int]:
        """The end of a context after which the model may read so many tokens. Raises ValueError if nothing is left."""
        if self.max_length is None:
            return context
        left = self.max_length - room
        require(left >= 1, "max_length", self.max_length, f"at least {room + 1}, for {room} tokens after a context")
        return context[-left:]

    def _batches(self, numbers: list[int], size: Callable[[int], int], quiet: bool) -> Iterator[list[int]]:
        """Batches of requests of like sizes, the largest first, by their numbers."""
        ordered = sorted(numbers, key=size, reverse=True)
        with tqdm(total=len(ordered), disable=quiet or self.subject.world.rank != 0) as bar:
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))


_until_the_end = ExitStack()  # the ranks stay together as long as the process may evaluate
atexit.register(_until_the_end.close)

if __name__ == "__main__":
    sys.modules["lasp.evaluation.harness"] = sys.modules["__main__"]
    cli_evaluate()
