"""The training loop, to be read from top to bottom.

A step sees batch_contexts contexts. Each data-parallel group takes its share of them one at a time, and each of its
ranks reads and computes only the tokens of its own units. The loss is the mean over all labels of the step, on all
ranks and in all contexts: their number is known before the first backward, so every rank divides its sum of losses by
it, and the sum of the ranks' gradients is the gradient.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.config import TrainConfig, require
from lasp.data import IGNORED, Context, PackedContexts, load_tokenizer, local_batch
from lasp.models import count_active_parameters, count_parameters, flops_per_token
from lasp.parallel import Sequence, SequenceParallel, comm
from lasp.training.balance import balance_experts
from lasp.training.engine import Engine, make_engine
from lasp.training.metrics import Metrics, model_flop_utilisation, peak_flops
from lasp.training.optimizer import learning_rate
from lasp.training.runtime import World, join_world


def train(config: TrainConfig) -> float:
    """Runs a configuration to its last step, from its last checkpoint if there is one; returns the held-out loss.

    Raises ValueError on every rank for a configuration that does not fit the world, the token files, the tokenizer or
    the checkpoint that is there; FileNotFoundError for files that are not; FloatingPointError for gradients that
    overflow.
    """
    with join_world(config) as world:
        training, held_out = open_data(config)
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

        tokens_per_step = config.batch_contexts * config.context_length
        flops, peak = flops_per_token(config.model, config.context_length), peak_flops(world.device, config.dtype)
        if first_step >= config.steps:
            return evaluate(engine.model, held_out, sp, world)
        with Metrics(config.run_dir, first_step=first_step, steps=config.steps, rank=world.rank) as metrics:
            metrics.say(describe(config, world, first_step))
            for step in range(first_step, config.steps):
                world.doing = f"step {step + 1}"
                start = time.perf_counter()
                lr = learning_rate(config.optimizer, step, config.steps)
                contexts = [training[step * config.batch_contexts + i] for i in range(config.batch_contexts)]
                loss = compute_gradients(engine, contexts, sp, world)
                grad_norm = engine.step(lr)
                balance = balance_experts(engine.model, all_ranks) if config.model.num_experts else {}

                taken = step + 1
                tokens_per_second = tokens_per_step / (time.perf_counter() - start)
                values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
                values |= balance
                if peak is not None:
                    values["mfu"] = model_flop_utilisation(flops, tokens_per_second, world.size, peak)
                metrics.log(taken, **values, tokens=taken * tokens_per_step)

                last = taken == config.steps
                if taken % config.eval_every == 0 or last:
                    valid_loss = evaluate(engine.model, held_out, sp, world)
                    metrics.log(taken, valid_loss=valid_loss)
                    metrics.say(f"step {taken}: loss {loss:.4f}, held-out loss {valid_loss:.4f}")
                if taken % config.checkpoint_every == 0 or last:
                    engine.save(taken)
        return valid_loss


def open_data(config: TrainConfig) -> tuple[PackedContexts, list[Context]]:
    """The training contexts without end, and the held-out ones of every evaluation: the file's first, unshuffled."""
    got, needed = config.model.vocab_size, load_tokenizer(config.data.tokenizer).vocab_size
    require(got >= needed, "vocab_size", got, f"at least the tokenizer's {needed}")
    training = PackedContexts(config.data.train, config.context_length, seed=config.seed)
    held_out = PackedContexts(config.data.valid, config.context_length, seed=config.seed, shuffle=False)
    wanted, there = config.data.eval_contexts, held_out.num_contexts
    require(wanted <= there, "eval_contexts", wanted, f"at most {there}, the contexts that {config.data.valid} holds")
    return training, [held_out[i] for i in range(wanted)]


def compute_gradients(engine: Engine, contexts: list[Context], sp: SequenceParallel, world: World) -> float:
    """The mean loss over all labels of the contexts; the engine gets each rank's part of its gradient."""
    labels = max(1, sum(count_labels(context) for context in contexts))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for context in share(contexts, world):
        batch = read_batch(context, sp, world.device)
        loss_sum, _ = engine.model(batch.tokens, batch.seq, labels=batch.labels)
        engine.backward(loss_sum / labels)
        total += loss_sum.detach()
    return all_ranks(total).item() / labels


@dataclass(frozen=True)
class Batch:
    """One context as a rank sees it: tokens and labels of its own units, int64 [1, T_local], and what links them."""

    tokens: Tensor
    labels: Tensor
    seq: Sequence


def read_batch(context: Context, sp: SequenceParallel, device: torch.device) -> Batch:
    seq = sp.sequence(context.length, context.cu_seqlens)
    tokens, labels = local_batch(context, seq.partition.ranges)
    return Batch(tokens.to(device), labels.to(device), seq)


def share(contexts: list[Context], world: World) -> list[Context]:
    """The contexts of this rank's data-parallel group."""
    group, groups = world.mesh["dp"].get_local_rank(), world.mesh["dp"].size()
    return contexts[group::groups]


def count_labels(context: Context) -> int:
    """How many tokens of a context have a label: all but the last ones of documents, which stand where pieces end."""
    ends = context.cu_seqlens[1:].tolist()
    return context.length - sum(int(context.labels(end - 1, end).item() == IGNORED) for end in ends)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: list[Context], sp: SequenceParallel, world: World) -> float:
    """The mean loss over all labels of the held-out contexts, in nats per token, without balancing losses."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for context in share(held_out, world):
        batch = read_batch(context, sp, world.device)
        total += torch.stack([part.double() for part in model(batch.tokens, batch.seq, labels=batch.labels)])
    model.train()
    loss_sum, count = all_ranks(total).tolist()
    return loss_sum / max(1, count)


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
