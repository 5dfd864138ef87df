"""The training loop, to be read from top to bottom.

A step sees batch_contexts contexts. Each data-parallel group takes its share of them, contexts_at_once at a time, and
each of its ranks reads and computes only the tokens of its own units. The loss is the mean over all labels of the step,
on all ranks and in all contexts: their number is known before the first backward, so every rank divides its sum of
losses by it, and the sum of the ranks' gradients is the gradient.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from lasp.config import TrainConfig, require
from lasp.data import Context, Mixture, Numbered
from lasp.models import count_active_parameters, count_parameters
from lasp.parallel import SequenceParallel, comm
from lasp.parallel.waits import waits
from lasp.training import checkpoint
from lasp.training.balance import balance_experts
from lasp.training.batches import Batch, join, read_batches, read_streams, share
from lasp.training.engine import Engine, make_engine
from lasp.training.heartbeat import heartbeat
from lasp.training.held_out import HeldOut, as_values, open_held_out, told_in_words
from lasp.training.host_memory import require_host_memory
from lasp.training.initial import Build, build_model
from lasp.training.metrics import Metrics, require_wandb
from lasp.training.native import NativeEngine
from lasp.training.numerics import find_nonfinite, name_contexts, require_same_replicas
from lasp.training.optimizer import learning_rate, require_finite
from lasp.training.ownership import hold
from lasp.training.paths import keep_tokenizer, with_absolute_paths, with_vocabulary
from lasp.training.planning import explained_memory, settled
from lasp.training.profile import profiling
from lasp.training.reading import Reader, Step
from lasp.training.runtime import World, join_world, sequence_parallel
from lasp.training.same_run import (
    positions_seen,
    record,
    require_same_on_ranks,
    tokenizer_fingerprint,
    tokens_seen,
)
from lasp.training.starts import keep_start
from lasp.training.stop import Stopped, stop_signals
from lasp.training.streaming import Segments, StreamedBatch
from lasp.training.together import any_of, together
from lasp.training.usage import describe_memory, memory_by_part


def train(config: TrainConfig, build: Build = build_model) -> float:
    """Runs a configuration to its last step, from its last checkpoint if there is one; returns the held-out loss.

    build: what makes its model. In evaluation mode that gives the losses of the labels, in training mode any.

    Raises Stopped on every rank, after the step that is at work and its checkpoint, if SIGTERM or SIGINT came to one.
    Raises ValueError on every rank for a configuration that does not fit the world, the token files, the tokenizer or
    the checkpoint that is there, for ranks with other settings or data than others, for tokens that are not in the
    vocabulary, or if another run is alive in run_dir; FileNotFoundError for files that are not there;
    FloatingPointError for losses, gradients or states to be saved that are not finite; RuntimeError if weights that
    several ranks hold have come to differ.
    """
    config = with_absolute_paths(config)
    with (
        join_world(config) as world,
        hold(config.run_dir, dist.group.WORLD) as lock,
        heartbeat(config.run_dir, world),
        waits.measured(),
    ):
        given = config
        config = together(dist.group.WORLD, lambda: with_vocabulary(given))[world.rank]
        together(dist.group.WORLD, lambda: require_wandb(given.wandb))
        training, held_out, fingerprints = open_data(config, world)
        config = settled(config, world)
        together(dist.group.WORLD, lambda: require_host_memory(config, world.mesh["sp"].size(), world.local_size))
        torch.manual_seed(config.seed)
        engine = make_engine(config, world, build)
        sp = sequence_parallel(config.parallel, config.model, world)
        segments = Segments.of(config)
        first_step = engine.restore()
        if first_step:
            go_on(training, config, fingerprints)

        if first_step >= config.steps:
            losses = evaluate_all(engine.model, held_out, sp, world, segments)
            say_finished(config, world, first_step, losses)
            return losses["valid_loss"]
        if world.rank == 0:
            keep_tokenizer(config)
            keep_start(config, world.size)
        metrics = Metrics(
            config.run_dir,
            first_step=first_step,
            steps=config.steps,
            rank=world.rank,
            log_every=config.log_every,
            wandb=config.wandb,
            settings=asdict(config),
        )
        steps = Reader(config, world, engine, metrics, partial(tell_nonfinite, config, engine, sp, world, segments))
        profiled = profiling(config.run_dir, world.rank, engine.model, config.profile)
        with metrics, stop_signals() as told, finishing_saves(engine), profiled as after_step:
            metrics.say(describe(config, world, first_step))
            for step in range(first_step, config.steps):
                world.doing = f"step {step + 1}"
                lr = learning_rate(config.optimizer, step, config.steps)
                length = config.context_length_at(step)
                contexts = training.take(config.batch_contexts, length)
                with explained_memory(config, world):
                    taken_now = [each.context for each in contexts]
                    loss = compute_gradients(engine, taken_now, sp, world, segments, config.contexts_at_once)
                    with record_function("optimizer"):
                        values = {"loss": loss, "grad_norm": engine.step(lr, loss)}
                if config.model.num_experts:
                    values |= balance_experts(engine.model, all_ranks, engine.halted)
                taken, tokens = step + 1, training.tokens
                steps.add(Step(taken, lr, length, contexts, tokens, values))
                after_step()

                last = taken == config.steps
                evaluates, saves = (
                    taken % every == 0 or last for every in (config.eval_every, config.checkpoint_every)
                )
                stopping, due = any_of(world.hosts, told.told, steps.due)
                if due or evaluates or saves or stopping or step == first_step:
                    steps.read()
                if step == first_step and isinstance(engine, NativeEngine):
                    parts = memory_by_part(engine.model, engine.optimizer, world.device)
                    metrics.note(taken, memory_by_part=parts)
                    metrics.say(describe_memory(parts))
                if evaluates:
                    losses = evaluate_all(engine.model, held_out, sp, world, segments)
                    metrics.log(taken, **losses)
                    metrics.say(f"step {taken}: loss {steps.loss:.4f}, {told_in_words(losses)}")
                if config.compare_replicas_every and taken % config.compare_replicas_every == 0:
                    require_same_replicas(engine.model, dist.group.WORLD)
                if saves or stopping:
                    engine.save(taken, lock, record(training.tokens, fingerprints, training.positions))
                if stopping:
                    break
                if evaluates or saves:
                    steps.restart()
        if last:
            say_finished(config, world, taken, losses)
            return losses["valid_loss"]
        metrics.say(f"told to stop: step {taken} is saved in {config.run_dir}, from where the same command goes on")
    raise Stopped


@contextmanager
def finishing_saves(engine: Engine) -> Iterator[None]:
    """Finishes the save under way before it is left, also by an error that all ranks have; others may be dead."""
    try:
        yield
    except (ValueError, FloatingPointError):
        engine.finish_saving()
        raise
    engine.finish_saving()


def open_data(config: TrainConfig, world: World) -> tuple[Mixture, list[HeldOut], dict[str, str]]:
    """The training contexts without end, the held-out ones of every evaluation, and fingerprints of the files, which
    are the same on every rank."""
    data, vocab_size = config.data, config.model.vocab_size
    opened: list[tuple[Mixture, list[HeldOut]]] = []

    def read() -> dict[str, str]:
        training = Mixture(
            data.corpora,
            config.context_length,
            seed=config.seed,
            vocab_size=vocab_size,
            shuffle_contexts=data.shuffle_contexts,
        )
        held_out, of_held_out = open_held_out(config, world.mesh["dp"].size())
        opened.append((training, held_out))
        return {
            "data.train": training.fingerprint,
            "data.valid": of_held_out,
            "data.tokenizer": tokenizer_fingerprint(data.tokenizer),
        }

    fingerprints = together(dist.group.WORLD, read)
    require_same_on_ranks(fingerprints)
    ((training, held_out),) = opened
    return training, held_out, fingerprints[world.rank]


def go_on(training: Mixture, config: TrainConfig, fingerprints: dict[str, str]) -> None:
    """Goes to the first context after those that the run's last checkpoint has seen.

    Raises ValueError on every rank if that is a checkpoint of another run.
    """

    def position() -> tuple[int, dict[str, int]]:
        path = checkpoint.require_latest(config.run_dir)
        saved = checkpoint.read_config(path)
        return tokens_seen(path, saved, config, fingerprints), positions_seen(saved)

    training.go_on(*together(dist.group.WORLD, position)[0])


def compute_gradients(
    engine: Engine,
    contexts: list[Context],
    sp: SequenceParallel,
    world: World,
    segments: Segments | None = None,
    at_once: int = 1,
) -> Tensor:
    """The mean loss over all labels of the contexts, a scalar on the device; the engine gets each rank's part of its
    gradient. at_once: so many are computed as one."""
    labels = sum(context.count_labels() for context in contexts)
    require(labels > 0, "data.train", "no label in this step's contexts", "one at least: raise batch_contexts")
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    with record_function("read"):
        batches = read(join(share(contexts, world), at_once), sp, world, segments)
    for batch in batches:
        if isinstance(batch, StreamedBatch):
            total += batch.backward(engine.model, labels)
            continue
        with record_function("forward"):
            loss_sum, _ = engine.model(**batch.inputs(world.device))
        with record_function("backward"):
            engine.backward(loss_sum / labels)
        total += loss_sum.detach()
    return all_ranks(total) / labels


def tell_nonfinite(
    config: TrainConfig,
    engine: Engine,
    sp: SequenceParallel,
    world: World,
    segments: Segments | None,
    loss: float,
    grad_norm: float,
    contexts: list[Numbered],
) -> str:
    """What is not finite in a step that was not taken, and where it comes from; takes the engine's gradients away."""
    what = f"gradient norm: got {grad_norm}" if math.isfinite(loss) else f"loss: got {loss}"
    story = f"{name_contexts(contexts)}: {what}, expected a finite number"
    if config.engine == "deepspeed":  # its gradients are not for looking at
        return story
    groups = world.mesh["dp"].size()
    some = (contexts[i : i + groups] for i in range(0, len(contexts), groups))
    rounds = (
        (each, partial(compute_gradients, engine, [one.context for one in each], sp, world, segments))
        for each in some
        if any(one.context.count_labels() for one in each)
    )
    story += f"; {find_nonfinite(engine.model, rounds, dist.group.WORLD)}"
    if config.model.num_experts:
        engine.model.balance.take()
    return story


def read(
    contexts: list[Context], sp: SequenceParallel, world: World, segments: Segments | None
) -> list[Batch] | list[StreamedBatch]:
    """This rank's part of some contexts, segment by segment if there are any."""
    if segments is None:
        return read_batches(contexts, sp, world)
    return read_streams(contexts, sp, world, segments)


def evaluate_all(
    model: nn.Module, held_out: list[HeldOut], sp: SequenceParallel, world: World, segments: Segments | None = None
) -> dict[str, float]:
    """The mean losses of all corpora, by what metrics call them."""
    return as_values(held_out, [evaluate(model, corpus.contexts, sp, world, segments) for corpus in held_out])


@record_function("evaluate")
@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: list[Context], sp: SequenceParallel, world: World, segments: Segments | None = None
) -> float:
    """The mean loss over all labels of the held-out contexts, in nats per token, without balancing losses.

    Raises FloatingPointError on every rank if it is not finite.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in read(share(held_out, world), sp, world, segments):
        if isinstance(batch, StreamedBatch):
            total += torch.stack(batch.loss(model))
            continue
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
    if config.recompute != "none":
        host = ", their inputs in the host's memory" if config.offload_activations else ""
        layers = "layers" if config.recompute_layers is None else f"{config.recompute_layers} layers"
        lines.append(f"{layers} are recomputed ({config.recompute}){host}")
    if config.segment_tokens is not None:
        lines.append(f"as streams of segments of {config.segment_tokens:,} tokens")
    if first_step:
        lines.append(f"going on from the checkpoint of step {first_step} in {config.run_dir}")
    return "\n".join(lines)


def say_finished(config: TrainConfig, world: World, step: int, losses: dict[str, float]) -> None:
    if world.rank == 0:
        path = checkpoint.latest(config.run_dir)
        print(f"finished {step} of {config.steps} steps: {told_in_words(losses)}, checkpoint {path}", flush=True)
