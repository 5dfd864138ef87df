"""The training loop, to be read from top to bottom.

A step sees batch_contexts contexts. Each data-parallel group takes its share of them one at a time, and each of its
ranks reads and computes only the tokens of its own units. The loss is the mean over all labels of the step, on all
ranks and in all contexts: their number is known before the first backward, so every rank divides its sum of losses by
it, and the sum of the ranks' gradients is the gradient.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.config import TrainConfig, require
from lasp.data import IGNORED, Context, PackedContexts, load_tokenizer, local_batch
from lasp.models import count_active_parameters, count_parameters, flops_per_token
from lasp.parallel import Sequence, SequenceParallel, comm
from lasp.parallel.agreement import agree
from lasp.training import checkpoint
from lasp.training.balance import balance_experts
from lasp.training.engine import Engine, make_engine
from lasp.training.metrics import Metrics, model_flop_utilisation, peak_flops
from lasp.training.optimizer import learning_rate, require_finite
from lasp.training.ownership import hold
from lasp.training.paths import keep_tokenizer, with_absolute_paths
from lasp.training.runtime import World, join_world
from lasp.training.same_run import record, require_same_on_ranks, settings, tokenizer_fingerprint, tokens_seen
from lasp.training.together import together


def train(config: TrainConfig) -> float:
    """Runs a configuration to its last step, from its last checkpoint if there is one; returns the held-out loss.

    Raises ValueError on every rank for a configuration that does not fit the world, the token files, the tokenizer or
    the checkpoint that is there, for ranks with other settings or data than others, for tokens that are not in the
    vocabulary, or if another run is alive in run_dir; FileNotFoundError for files that are not there;
    FloatingPointError for gradients, a held-out loss or states to be saved that are not finite.
    """
    config = with_absolute_paths(config)
    with join_world(config) as world, hold(config.run_dir, dist.group.WORLD) as lock:
        training, held_out, fingerprints = open_data(config, world)
        torch.manual_seed(config.seed)
        engine = make_engine(config, world)
        sp = SequenceParallel(
            world.mesh["sp"].get_group(),
            layout=config.parallel.layout,
            state_exchange=config.parallel.state_exchange,
            softmax=config.parallel.softmax,
            device=world.device,
        )
        first_step = engine.restore()
        seen = position(config, fingerprints) if first_step else 0

        tokens_per_step = config.batch_contexts * config.context_length
        flops, peak = flops_per_token(config.model, config.context_length), peak_flops(world.device, config.dtype)
        if first_step >= config.steps:
            valid_loss = evaluate(engine.model, held_out, sp, world)
            say_finished(config, world, first_step, valid_loss)
            return valid_loss
        if world.rank == 0:
            keep_tokenizer(config)
        with Metrics(config.run_dir, first_step=first_step, steps=config.steps, rank=world.rank) as metrics:
            metrics.say(describe(config, world, first_step))
            for step in range(first_step, config.steps):
                world.doing = f"step {step + 1}"
                start = time.perf_counter()
                lr = learning_rate(config.optimizer, step, config.steps)
                contexts = [training[seen + i] for i in range(config.batch_contexts)]
                loss = compute_gradients(engine, contexts, sp, world)
                grad_norm = engine.step(lr)
                balance = balance_experts(engine.model, all_ranks) if config.model.num_experts else {}

                taken, seen = step + 1, seen + config.batch_contexts
                tokens_per_second = tokens_per_step / (time.perf_counter() - start)
                values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
                values |= balance
                if peak is not None:
                    values["mfu"] = model_flop_utilisation(flops, tokens_per_second, world.size, peak)
                metrics.log(taken, **values, tokens=seen * config.context_length)

                last = taken == config.steps
                if taken % config.eval_every == 0 or last:
                    valid_loss = evaluate(engine.model, held_out, sp, world)
                    metrics.log(taken, valid_loss=valid_loss)
                    metrics.say(f"step {taken}: loss {loss:.4f}, held-out loss {valid_loss:.4f}")
                if taken % config.checkpoint_every == 0 or last:
                    engine.save(taken, lock, record(seen * config.context_length, fingerprints))
        say_finished(config, world, taken, valid_loss)
        return valid_loss


def open_data(config: TrainConfig, world: World) -> tuple[PackedContexts, list[Context], dict[str, str]]:
    """The training contexts without end, the held-out ones of every evaluation (the file's first, unshuffled), and
    fingerprints of the files, which are the same on every rank."""
    data, length, seed, vocab_size = config.data, config.context_length, config.seed, config.model.vocab_size
    opened: list[PackedContexts] = []

    def read() -> dict[str, str]:
        needed = load_tokenizer(data.tokenizer).vocab_size
        require(vocab_size >= needed, "vocab_size", vocab_size, f"at least the tokenizer's {needed}")
        training = PackedContexts(data.train, length, seed=seed, vocab_size=vocab_size)
        held_out = PackedContexts(data.valid, length, seed=seed, shuffle=False, vocab_size=vocab_size)
        wanted, there = data.eval_contexts, held_out.num_contexts
        require(wanted <= there, "eval_contexts", wanted, f"at most {there}, the contexts that {data.valid} holds")
        labelled = any(held_out[i].count_labels() for i in range(wanted))
        require(labelled, "eval_contexts", wanted, f"more: the first {wanted} contexts of {data.valid} have no label")
        opened.extend([training, held_out])
        return {
            "data.train": training.file.fingerprint(vocab_size),
            "data.valid": held_out.file.fingerprint(vocab_size),
            "data.tokenizer": tokenizer_fingerprint(data.tokenizer),
        }

    fingerprints = together(dist.group.WORLD, read)
    require_same_on_ranks(fingerprints)
    training, held_out = opened
    return training, [held_out[i] for i in range(data.eval_contexts)], fingerprints[world.rank]


def position(config: TrainConfig, fingerprints: dict[str, str]) -> int:
    """The number of the first context after those that the run's last checkpoint has seen.

    Raises ValueError on every rank if that is a checkpoint of another run.
    """

    def tokens() -> int:
        path = checkpoint.require_latest(config.run_dir)
        return tokens_seen(path, checkpoint.read_config(path), settings(config, fingerprints))

    seen, *_ = together(dist.group.WORLD, tokens)
    return -(-seen // config.context_length)  # where another context length was permitted, a part of one is left out


def compute_gradients(engine: Engine, contexts: list[Context], sp: SequenceParallel, world: World) -> float:
    """The mean loss over all labels of the contexts; the engine gets each rank's part of its gradient."""
    labels = sum(context.count_labels() for context in contexts)
    require(labels > 0, "data.train", "no label in this step's contexts", "one at least: raise batch_contexts")
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in read_batches(share(contexts, world), sp, world):
        loss_sum, _ = engine.model(**batch.inputs(world.device))
        engine.backward(loss_sum / labels)
        total += loss_sum.detach()
    return all_ranks(total).item() / labels


@dataclass(frozen=True)
class Batch:
    """One context as a rank sees it: tokens and labels of its own units, int64 [B, T_local], and what links them.

    A context of equally long documents is a batch of them, B = 1 otherwise. scored: int64 [N], which of the labels,
    flattened, are not -100, if those are fewer than half.
    """

    tokens: Tensor
    labels: Tensor
    seq: Sequence

    @cached_property
    def scored(self) -> Tensor | None:
        places = (self.labels.flatten() != IGNORED).nonzero()[:, 0]
        return places if 2 * len(places) < self.labels.numel() else None

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model takes, on its device."""
        scored = None if self.scored is None else self.scored.to(device)
        tokens, labels = self.tokens.to(device), self.labels.to(device)
        return {"tokens": tokens, "seq": self.seq, "labels": labels, "scored": scored}


def read_batches(contexts: list[Context], sp: SequenceParallel, world: World) -> list[Batch]:
    """This rank's units of some contexts, on the CPU.

    Raises ValueError on every rank if one of them reads a token that is not in the vocabulary.
    """
    rows = [context.row_length for context in contexts]
    sequences = [
        sp.sequence(context.length, context.cu_seqlens) if length is None else sp.sequence(length)
        for context, length in zip(contexts, rows, strict=True)
    ]
    batches: list[Batch] = []

    def read() -> None:
        for context, length, seq in zip(contexts, rows, sequences, strict=True):
            if length is None:
                batches.append(Batch(*local_batch(context, seq.partition.ranges), seq))
            else:
                tokens, labels = context.tokens(0, context.length), context.labels(0, context.length)
                batches.append(Batch(seq.shard(tokens.view(-1, length)), seq.shard(labels.view(-1, length)), seq))

    agree(dist.group.WORLD, world.device, read)
    return batches


def share(contexts: list[Context], world: World) -> list[Context]:
    """The contexts of this rank's data-parallel group."""
    group, groups = world.mesh["dp"].get_local_rank(), world.mesh["dp"].size()
    return contexts[group::groups]


@torch.no_grad()
def evaluate(model: nn.Module, held_out: list[Context], sp: SequenceParallel, world: World) -> float:
    """The mean loss over all labels of the held-out contexts, in nats per token, without balancing losses.

    Raises FloatingPointError on every rank if it is not finite.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in read_batches(share(held_out, world), sp, world):
        total += torch.stack([part.double() for part in model(**batch.inputs(world.device))])
    model.train()
    loss_sum, count = all_ranks(total).tolist()
    return require_finite(loss_sum / count, "held-out loss")


def all_ranks(x: Tensor) -> Tensor:
    """The sum of x over the world."""
    return comm.all_reduce(x, dist.group.WORLD).wait()


def describe(config: TrainConfig, world: World, first_step: int) -> str:
    model, groups = config.model, world.mesh["dp"].size()
    ranks = f"{world.mesh['sp'].size()} {world.device.type} ranks"
    active = f" ({count_active_parameters(model):,} active)" if model.num_experts else ""
    lines = [
        f"{count_parameters(model):,} parameters{active}, {config.dtype}, layers {model.layers} ({model.mixer})",
        f"contexts of {config.context_length:,} tokens, each split over {ranks}; {groups} at a time",
    ]
    if first_step:
        lines.append(f"going on from the checkpoint of step {first_step} in {config.run_dir}")
    return "\n".join(lines)


def say_finished(config: TrainConfig, world: World, step: int, valid_loss: float) -> None:
    if world.rank == 0:
        path = checkpoint.latest(config.run_dir)
        print(f"finished {step} of {config.steps} steps: held-out loss {valid_loss:.4f}, checkpoint {path}", flush=True)
