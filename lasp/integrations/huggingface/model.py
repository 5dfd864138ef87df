"""lasp's decoder as Transformers' causal language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lasp.config import require
from lasp.integrations.huggingface.batch import DOCUMENTS, described, is_integers, read_batch
from lasp.integrations.huggingface.cache import CACHE
from lasp.integrations.huggingface.config import CODE, LaspConfig
from lasp.integrations.huggingface.generation import RecurrentGenerationMixin, cache_for
from lasp.integrations.huggingface.loss import check_ids, next_labels
from lasp.models import Decoder
from lasp.models.decays import ConstantDecay
from lasp.models.layers import at_least_float32
from lasp.models.loss import IGNORE

REMOTE_CODE = '''"""For trust_remote_code: the classes are those of the lasp that is installed."""

from lasp.integrations.huggingface import LaspConfig, LaspForCausalLM

__all__ = ["LaspConfig", "LaspForCausalLM"]
'''


class LaspForCausalLM(RecurrentGenerationMixin, PreTrainedModel):
    """A `Decoder`, on one device, with the calling convention of Transformers. Works with `generate` and `Trainer`."""

    config_class = LaspConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LaspConfig):
        super().__init__(config)
        self.decoder = Decoder(config.shape)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, vocabulary] of the next token at each of T columns; zeros where a column holds no token.

        Args:
            input_ids: [B, T] integers; or inputs_embeds [B, T, hidden] in their place.
            attention_mask: [B, columns], those in the cache first: 1 where there is a token, 0 at padding, wherever it
                is. Tokens see, and states hold, what they would without the padding.
            position_ids: [B, T]; documents begin at 0.
            cache: a RecurrentCache, what came before these tokens; updated in place. Before Transformers 5.24 it is
                called past_key_values, here and in what is returned.
            labels: [B, T], not shifted, -100 where there is none.
            num_items_in_batch: what the sum of the cross-entropies is divided by; the labels' number if None.
            logits_to_keep: of the last so many columns, 0 for all; or these columns' indices.
            kwargs: what else describes packed documents (see `read_batch`), as DataCollatorWithFlattening gives it; and
                shift_labels, labels that the caller has shifted. A Trainer waits for all labels that are named above.

        Raises:
            ValueError: what is not honoured, by name; ids or labels outside the vocabulary.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        documents = {name: kwargs.pop(name) for name in DOCUMENTS if name in kwargs}
        refuse_others({"output_attentions": getattr(self.config, "output_attentions", None), **kwargs})
        require((input_ids is None) != (inputs_embeds is None), "input_ids", "both or none", "it or inputs_embeds")
        given: Any = inputs_embeds if input_ids is None else input_ids
        if input_ids is None:
            hidden = self.config.hidden_size
            fits = isinstance(given, Tensor) and given.is_floating_point() and given.ndim == 3
            expected = f"floats [batch, tokens, {hidden}]"
            require(fits and given.shape[2] == hidden, "inputs_embeds", described(given), expected)
        else:
            fits = is_integers(given) and given.ndim == 2
            require(fits, "input_ids", described(given), "integers [batch, tokens]")
        wants_cache = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        cache = cache_for(past_key_values, cache, wants_cache, given.shape[0])
        batch = read_batch(
            given.shape[:2], given.device, cache, attention_mask=attention_mask, position_ids=position_ids, **documents
        )
        targets = next_labels(batch, labels, shift_labels)
        kept = _columns(logits_to_keep, given.shape[1])
        if targets is not None:
            require(kept == slice(0, None), "logits_to_keep", logits_to_keep, "0, which is all, with labels")
            check_ids("labels", targets[targets != IGNORE], self.config.vocab_size)
        if input_ids is not None:
            input_ids = input_ids.long().masked_fill(~batch.valid, 0)  # whatever stands at padding
            check_ids("input_ids", input_ids, self.config.vocab_size)

        x = given if input_ids is None else self.get_input_embeddings()(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        recomputing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        last, _ = self.decoder.hidden_states(
            batch.pack(x),
            batch.sequence(cache),
            memory=cache,
            recompute=self._gradient_checkpointing_func if recomputing and cache is None else None,
            inputs=states,
        )
        if cache is not None:
            cache.record(batch.valid)
        last = batch.unpack(last)
        logits = self.decoder.logits(last[:, kept])
        output = CausalLMOutputWithPast(
            loss=None if targets is None else self._loss(logits, targets, num_items_in_batch),
            logits=logits,
            hidden_states=None if states is None else (*map(batch.unpack, states), last),
            **{CACHE: cache},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _loss(self, logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
        return self.loss_function(
            logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets, num_items_in_batch=items
        )

    def get_input_embeddings(self) -> Any:
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None if the embeddings are tied."""
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        require(self.decoder.head is not None, "set_output_embeddings", "a head", "none: the embeddings are tied")
        self.decoder.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.decoder.config = self.config.shape
        return embeddings

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As Transformers does it; beside the weights lies what trust_remote_code needs to find lasp's classes."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            Path(save_directory, f"{CODE}.py").write_text(REMOTE_CODE)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        require(every_n_layers == 1, "every_n_layers", every_n_layers, "1: every block is recomputed")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Called for what is not in a checkpoint: buffers always, parameters of a module that are missing."""
        name = next((name for name, each in self.decoder.named_modules() if each is module), None)
        if name is None:  # such as a larger embedding, before it is in its place
            super()._init_weights(module)
            return
        if isinstance(module, ConstantDecay):
            module.log_decay = at_least_float32(module.log_decay)  # a half model's decays, too
        own = module.parameters(recurse=False)
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        self.decoder.init_module(name, module)
        for parameter, value in loaded:
            parameter.copy_(value)


def _columns(logits_to_keep: Any, columns: int) -> slice | Tensor:
    """Which of a batch's columns these are."""
    counts = type(logits_to_keep) is int and logits_to_keep >= 0
    indices = is_integers(logits_to_keep) and logits_to_keep.ndim == 1
    indices = indices and bool(((logits_to_keep >= -columns) & (logits_to_keep < columns)).all())
    expected = f"a number of last columns, 0 for all, or a tensor [N] of indices below {columns}"
    require(counts or indices, "logits_to_keep", logits_to_keep, expected)
    return slice(-logits_to_keep, None) if counts else logits_to_keep


def refuse_others(arguments: dict[str, Any]) -> None:
    """Raises ValueError for arguments of forward that nothing is made of, unless they say what is so anyway."""
    said_anyway = {"output_attentions": False, "output_router_logits": False, "is_causal": True}
    for name, value in arguments.items():
        only = said_anyway.get(name)
        same = value is None or (only is not None and value is only)
        require(same, name, type(value).__name__, "no such argument" if only is None else f"{only}, as it always is")


def to_huggingface(decoder: Decoder, **kwargs: Any) -> LaspForCausalLM:
    """A Transformers model with the decoder's own tensors; kwargs are more fields of its configuration."""
    with torch.device("meta"):
        model = LaspForCausalLM(LaspConfig.of(decoder.config, **kwargs))
    model.decoder = decoder
    model.config.dtype = next(decoder.parameters()).dtype
    return model
