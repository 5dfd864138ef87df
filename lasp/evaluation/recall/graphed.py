"""Runs that one GPU trains at the same time: their data lies there, and a step is one CUDA graph.

A step of so small a model is some hundred kernels of a few microseconds each, which a host does not start fast enough
and of which one does not fill a GPU. Here the host starts a whole step at once, many steps ahead, and each run has a
stream of its own (lasp.evaluation.recall.at_once).

The steps are those of lasp.training.train: the same sequences in the same order, loss, clipping, learning rates and
update. On a CPU a step is no graph.
"""

import gc
import math
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lasp.config import TrainConfig
from lasp.data import IGNORED, PackedContexts, TokenFile
from lasp.parallel import SequenceParallel
from lasp.training.initial import build_model
from lasp.training.optimizer import build_optimizer, learning_rate, require_finite

WARM = 3  # steps before the graph is made: kernels are compiled, the optimiser gets its states
STRETCH, AHEAD = 4, 4  # steps after which the GPU tells where it is, and how many times as many wait there: with many
# more the driver has the host wait, and all other runs with it


class Documents:
    """Equally long documents on a device. tokens: [N, T] int32. labels: [N, T] bool, whether the next token is one.

    counts: how many each has, int64 [N] on the host.
    """

    def __init__(self, file: TokenFile, device: torch.device):
        self.length = file.num_tokens // file.num_documents
        shape = file.num_documents, self.length
        scored = np.ones(shape, bool) if file.mask is None else file.mask.reshape(shape) != 0
        labels = np.concatenate([scored[:, 1:], np.zeros_like(scored[:, :1])], axis=1)
        self.counts = labels.sum(1)
        self.labels = torch.from_numpy(labels).to(device)
        self.tokens = torch.from_numpy(file.tokens.reshape(shape).astype(np.int32)).to(device)


class GraphedRun:
    """A run of steps of one context, a batch of documents; in the current stream, which no other run is in.

    weights: float32, with the optimiser's states. model: what computes, the same or a copy in bfloat16. meanwhile: is
    called between the parts of its making, so that other runs go on.
    """

    def __init__(
        self, config: TrainConfig, documents: Documents, device: torch.device, meanwhile: Callable[[], object]
    ):
        self.config, self.documents = config, documents
        rows = _batches(config, documents)
        self.most_labels = int(documents.counts[rows].sum(1).max())
        self.rows = torch.from_numpy(rows.astype(np.int32)).to(device)
        rates = [learning_rate(config.optimizer, step, config.steps) for step in range(config.steps)]
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self.losses = torch.zeros(config.steps, dtype=torch.float32, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.sp = SequenceParallel(None, device=device)
        self.seq = self.sp.sequence(documents.length)
        torch.manual_seed(config.seed)
        self.weights = build_model(replace(config, recompute="none"), device)
        self.optimizer = build_optimizer(self.weights, config.optimizer)
        self.lr = torch.tensor(config.optimizer.lr, device=device)
        for group in self.optimizer.param_groups:
            group |= {"lr": self.lr, "capturable": device.type == "cuda"}
        self.model = self.weights
        if config.dtype == "bfloat16":
            self.model = deepcopy(self.weights).bfloat16()
            for weight in self.weights.parameters():
                weight.grad = torch.zeros_like(weight)
        self._started = min(WARM, config.steps)
        self._under_way: deque[torch.cuda.Event] = deque()
        for _ in range(self._started):
            meanwhile()
            self._take()
        meanwhile()
        self._graph = _graph(self._take) if device.type == "cuda" else None

    def go_on(self) -> bool:
        """Starts steps until AHEAD stretches are under way or no step is left; whether all are taken."""
        while self._under_way and self._under_way[0].query():
            self._under_way.popleft()
        take = self._take if self._graph is None else self._graph.replay
        for _ in range(AHEAD - len(self._under_way)):
            stretch = min(STRETCH, self.config.steps - self._started)
            self._started += stretch
            for _ in range(stretch):
                take()
            if self._graph is not None and stretch:
                self._under_way.append(torch.cuda.Event())
                self._under_way[-1].record()
        return self._started == self.config.steps and not self._under_way

    def finish(self) -> Tensor:
        """After all steps: their losses [steps], on the host, and the optimiser as other runs have it.

        Raises FloatingPointError if the last loss is not finite.
        """
        losses = self.losses.cpu()
        require_finite(losses[-1].item(), f"loss of the last step of {self.config.run_dir}")
        for group in self.optimizer.param_groups:
            group |= {"lr": self.rates[-1].item(), "capturable": False}
        return losses

    def _take(self) -> None:
        """One step. Nothing in it depends on numbers that the host would have to know."""
        rows = self.rows.index_select(0, self.step)[0]
        tokens = self.documents.tokens.index_select(0, rows).long()
        known = self.documents.labels.index_select(0, rows)
        labels = tokens.roll(-1, 1).where(known, IGNORED)
        # As many places in each step: a document's last token, which has no label, stands where there are fewer.
        scored = known.flatten().nonzero_static(size=self.most_labels, fill_value=self.documents.length - 1)[:, 0]
        self.model.zero_grad()
        loss_sum, count = self.model(tokens, self.seq, labels=labels, scored=scored)
        loss = loss_sum / count
        loss.backward()
        weights: list[Tensor] = list(self.weights.parameters())
        copies: list[Tensor] = list(self.model.parameters())
        if self.model is not self.weights:
            torch._foreach_copy_(_gradients(weights), _gradients(copies))
        nn.utils.clip_grad_norm_(weights, self.config.optimizer.clip_norm)
        self.lr.copy_(self.rates.index_select(0, self.step)[0])
        self.optimizer.step()
        with torch.no_grad():
            if self.model is not self.weights:
                torch._foreach_copy_(copies, weights)
            self.losses.index_copy_(0, self.step, loss.detach()[None])
            self.step += 1


def _gradients(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _batches(config: TrainConfig, documents: Documents) -> np.ndarray:
    """The documents of each step, int64 [steps, B]."""
    (corpus,) = config.data.corpora
    contexts = PackedContexts(corpus, config.context_length, seed=config.seed)
    rows = config.context_length // documents.length
    epochs = math.ceil(config.steps * rows / contexts.file.num_documents)
    order = np.concatenate([contexts.documents(epoch) for epoch in range(epochs)])
    return order[: config.steps * rows].reshape(config.steps, rows)


def _graph(take: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Other streams do go on meanwhile, unlike with torch.cuda.graph."""
    gc.collect()  # no graph of an earlier run may go while one is made
    if 2 * torch.cuda.memory_reserved() > torch.cuda.get_device_properties().total_memory:
        torch.cuda.empty_cache()  # what such graphs had; the GPU's other work has to end for it
    torch.cuda.current_stream().synchronize()  # so that also what is shared by all runs is there
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")  # NCCL has threads that look after events
    take()
    graph.capture_end()
    return graph
