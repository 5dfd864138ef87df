"""Training on Megatron-Core: its schedules, distributed data parallelism, optimizer, datasets and checkpoints.

`launch/megatron.sh` starts it. It goes on from the last checkpoint in the run's directory, on any mesh.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.config import ModelConfig, require
from lasp.data import TokenFile, Tokenizer, load_tokenizer
from lasp.integrations.megatron.cpu import run_on_cpu
from lasp.integrations.megatron.data import build_dataset, micro_batches, order
from lasp.integrations.megatron.run import Run
from lasp.integrations.megatron.sequence import shard_batch
from lasp.integrations.megatron_weights import require_same_shape, write_shape
from lasp.kernels.parked import to_device
from lasp.launched import end_with_launcher
from lasp.models.loss import IGNORE
from lasp.parallel import comm
from lasp.parallel.agreement import agree
from lasp.training import integrity
from lasp.training.optimizer import require_finite
from lasp.training.same_run import record, require_same_on_ranks, settings, tokenizer_fingerprint, tokens_seen
from lasp.training.stop import Stopped, stop_signals
from lasp.training.storage import only_data, read_metadata
from lasp.training.together import on_rank_0, together

RUN_FILE = "run.json"  # in a checkpoint: the run's options, and what it was trained on
MAY_CHANGE = (  # when a run goes on: see lasp.training.same_run
    "run_dir",
    "steps",
    "micro_batch",
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "expert_parallel",
    "distributed_optimizer",
    "recompute",
    "save_every",
    "timeout",
    "initial_weights",
    "allow_changed",
)
PART_OF_A_CHECKPOINT = ("preset", "model", "mixer", "pattern", "rope_theta", "sequence_length", "global_batch")


def train(run: Run) -> list[float]:
    """Trains to the end of the run; the loss of every step, the same on every rank.

    Raises:
        ValueError: on every rank, before the model is built, if the run does not fit the ranks, or ranks were given
            different settings or data; then, if the checkpoint to go on from is another run's, or for a token that is
            not in the vocabulary.
        FloatingPointError: on every rank, for a loss, a gradient or what is to be saved that is not finite.
        Stopped: on every rank, after the step that is at work and its checkpoint, if SIGTERM or SIGINT came to one.
    """
    spread = run.distributed_optimizer
    expected = "False: Megatron restores its checkpoints with Apex's or TransformerEngine's Adam only"
    require(HAVE_APEX_OR_TE or not spread, "distributed_optimizer", spread, expected)
    config = join_mesh(run)
    tokenizer, fingerprints = open_data(run)
    dataset = build_dataset(run, tokenizer)
    state = Training(run, config, tokenizer.vocab_size, fingerprints | {"data.order": order(dataset)})
    losses: list[float] = []
    first_step = state.restore()
    with stop_signals() as told:
        for step in range(first_step, run.steps):
            started = time.perf_counter()
            losses.append(state.step(dataset, step))
            stopping, last = told.asked(dist.group.WORLD), step + 1 == run.steps
            if last or stopping or (step + 1) % run.save_every == 0:
                state.save(step + 1)
            if dist.get_rank() == 0:
                rate = run.global_batch * run.sequence_length / (time.perf_counter() - started)
                print(f"step {step + 1}/{run.steps}  loss {losses[-1]:.4f}  {rate:.0f} tokens/s", flush=True)
            if stopping and not last:
                if dist.get_rank() == 0:
                    print("told to stop: the same command goes on from here", flush=True)
                raise Stopped
    return losses


def open_data(run: Run) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and fingerprints of the files, which are the same on every rank."""
    tokenizers = []

    def read() -> dict[str, str]:
        tokenizers.append(load_tokenizer(run.tokenizer))
        data = TokenFile(run.data).fingerprint(tokenizers[0].vocab_size)
        return {"data": data, "tokenizer": tokenizer_fingerprint(run.tokenizer)}

    everybody = together(dist.group.WORLD, read)
    require_same_on_ranks(everybody)
    return tokenizers[0], everybody[0]


def join_mesh(run: Run) -> TransformerConfig:
    """Makes this process a rank of Megatron's mesh, seeds it, and returns the configuration of the run's model.

    Raises ValueError on every rank, before the mesh exists, if the run does not fit the ranks or is not theirs all.
    """
    end_with_launcher()
    cpu = not torch.cuda.is_available()
    if cpu:
        run_on_cpu()
    else:
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    config = run.transformer_config(cpu)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(seconds=run.timeout))
    require_same_on_ranks(together(dist.group.WORLD, lambda: settings(run)))
    run.data_parallel(dist.get_world_size())
    assert dist.group.WORLD is not None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.tensor_parallel,
        context_parallel_size=run.context_parallel,
        pipeline_model_parallel_size=run.pipeline_parallel,
        expert_model_parallel_size=run.expert_parallel,
        expert_tensor_parallel_size=run.expert_tensor_parallel,
        distributed_timeout_minutes=comm.timeout(dist.group.WORLD) / 60,
    )
    torch.manual_seed(run.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    if not cpu:
        model_parallel_cuda_manual_seed(run.seed)
    return config


class Training:
    """The model, its optimizer and the learning-rate schedule."""

    def __init__(self, run: Run, config: Any, vocab_size: int, fingerprints: Mapping[str, str] = MappingProxyType({})):
        self.run, self.vocab_size, self.fingerprints = run, vocab_size, fingerprints
        self.shape = run.shape(config, vocab_size) if run.model == "gpt" else None
        model = run.build(config, vocab_size)
        if run.initial_weights is not None:
            assert self.shape is not None
            load_weights(model, run.initial_weights, self.shape)
        if torch.cuda.is_available():
            model = model.cuda()
        if config.bf16:
            model = Float16Module(config, model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=run.distributed_optimizer,
        )
        self.model = DistributedDataParallel(config, ddp, model)
        self.model.broadcast_params()
        config.no_sync_func = self.model.no_sync
        config.finalize_model_grads_func = finalize_model_grads
        options = OptimizerConfig(
            optimizer="adam",
            lr=run.lr,
            min_lr=run.lr / 10,
            weight_decay=run.weight_decay,
            adam_beta2=0.95,
            clip_grad=run.clip_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=run.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])
        _fuse(self.optimizer)
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=run.lr,
            min_lr=run.lr / 10,
            lr_warmup_steps=min(run.warmup_steps, run.steps - 1),
            lr_decay_steps=run.steps,
            lr_decay_style="cosine",
            start_wd=run.weight_decay,
            end_wd=run.weight_decay,
            wd_incr_steps=run.steps,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # a restart may take more steps
        )

    def step(self, dataset: Any, step: int) -> float:
        """One update; the mean loss per token over all ranks.

        Raises FloatingPointError on every rank if that or the gradient norm is not finite; the weights are not to be
        saved then.
        """
        run, ranks = self.run, parallel_state.get_data_parallel_world_size()
        batches: list[dict[str, Tensor]] = []

        def read() -> None:
            rank = parallel_state.get_data_parallel_rank()
            batches.extend(micro_batches(dataset, run, step, rank, ranks, self.vocab_size))

        agree(dist.group.WORLD, read)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(increment=1)
        seen = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=run.global_batch // (ranks * run.micro_batch),
            seq_length=run.sequence_length,
            micro_batch_size=run.micro_batch,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        both = torch.stack(seen).sum(0) if seen else torch.zeros(2, device=next(self.model.parameters()).device)
        both = comm.all_reduce(both, parallel_state.get_data_parallel_group(with_context_parallel=True)).wait()
        total, count = comm.all_reduce(both, parallel_state.get_pipeline_model_parallel_group()).wait().tolist()
        where = f"step {step + 1}, samples {step * run.global_batch} to {(step + 1) * run.global_batch - 1}"
        require_finite(float(grad_norm), f"{where}: gradient norm")
        return require_finite(total / count, f"{where}: loss")

    def save(self, step: int) -> None:
        """Another mesh may go on from this. Raises FloatingPointError on every rank, and saves nothing, if a weight or
        a state is not finite."""
        integrity.require_finite(self._tensors(), dist.group.WORLD)
        folder = self._folder / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(self._parts(is_loading=False) | {"step": step}, str(folder))

        def describe() -> None:
            if self.shape is not None:
                write_shape(folder, self.shape)
            seen = step * self.run.global_batch * self.run.sequence_length
            saved = asdict(self.run) | record(seen, dict(self.fingerprints))
            (folder / RUN_FILE).write_text(json.dumps(saved, indent=2))

        def name_latest() -> None:
            (self._folder / "latest.new").write_text(folder.name)
            (self._folder / "latest.new").rename(self._folder / "latest")

        on_rank_0(dist.group.WORLD, describe)
        integrity.seal(folder, dist.group.WORLD)
        on_rank_0(dist.group.WORLD, name_latest)

    def restore(self) -> int:
        """Loads the last checkpoint, if there is one; the number of steps that have been taken.

        Raises ValueError on every rank if it is another run's, or damaged.
        """
        latest = self._folder / "latest"
        if not latest.exists():
            return 0
        folder = self._folder / latest.read_text()
        integrity.verify(folder, dist.group.WORLD)
        together(dist.group.WORLD, lambda: self._require_same_run(folder))
        parts = _load(self._parts(is_loading=True), folder)
        self.model.module.load_state_dict(parts["model"], strict=False)  # local norms have no _extra_state
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        return parts["step"]

    def _require_same_run(self, folder: Path) -> None:
        file = folder / RUN_FILE
        require(file.is_file(), f"checkpoint {folder}", f"no {RUN_FILE}", "one")
        saved = json.loads(file.read_text())
        tokens_seen(folder, saved, self.run, self.fingerprints, may_change=MAY_CHANGE, fixed=PART_OF_A_CHECKPOINT)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that is saved of this rank."""
        yield from self.model.module.named_parameters()
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            yield from integrity.pieces(part.optimizer)

    @property
    def _folder(self) -> Path:
        return Path(self.run.run_dir) / "checkpoints"

    def _parts(self, is_loading: bool) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}


def load_weights(model: Any, source: str, shape: ModelConfig) -> None:
    """Loads this rank's part of a checkpoint's weights. Raises ValueError on every rank if it is of another shape."""
    require_same_shape(Path(source), shape)
    parts = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    model.load_state_dict(_load(parts, Path(source)), strict=False)


def _load(parts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Megatron unpickles what it finds: here only what is data, and ValueError for a table of contents that is code."""
    read_metadata(folder)
    with only_data(folder):
        return dist_checkpointing.load(parts, str(folder))


def _forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    device = next(model.parameters()).device
    whole = {name: to_device(x, device) for name, x in next(data_iterator).items()}
    batch = shard_batch(whole, parallel_state.get_context_parallel_group())
    counts = batch["loss_mask"] > 0
    total = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"].where(counts, IGNORE))
    return total, partial(_with_count, counts.sum())


def _with_count(count: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, count, both): Megatron divides gradients by the count over all ranks and microbatches."""
    return total, count.int(), torch.stack([total.detach(), count])


def _fuse(optimizer: Any) -> None:
    """One kernel for PyTorch's AdamW, which Megatron takes where neither Apex nor TransformerEngine brings one."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True
