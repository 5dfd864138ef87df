"""Small Megatron models, one rank's training of them, and Megatron's own on any mesh."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.integrations.megatron import gpt_layer_specs, run_on_cpu, shard_batch

VOCABULARY, LENGTH, SEQUENCES, STEPS, LR = 32, 32, 4, 3, 0.1


@dataclass(frozen=True)
class Mesh:
    """Sizes of the model-parallel groups; data parallelism takes the rest."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        return f"tp{self.tp}-cp{self.cp}-pp{self.pp}-ep{self.ep}"

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def etp(self) -> int:
        return 1 if self.ep > 1 else self.tp

    def enter(self) -> None:
        """Makes this Megatron's mesh; its process groups, dozens of them, last until other meshes have been entered."""
        run_on_cpu()
        state = vars(parallel_state)
        parallel_state.destroy_model_parallel()
        key = torch.distributed.group.WORLD, self  # a failed test renews the world
        if key in _ENTERED:
            state.update(_ENTERED[key][0])
            return
        while len(_ENTERED) >= LASTING:
            _, groups = _ENTERED.pop(next(iter(_ENTERED)))
            for group in groups & set(torch.distributed.distributed_c10d._world.pg_map):
                torch.distributed.destroy_process_group(group)
        before = set(torch.distributed.distributed_c10d._world.pg_map)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )
        made = set(torch.distributed.distributed_c10d._world.pg_map) - before
        _ENTERED[key] = {name: value for name, value in state.items() if name.startswith("_") and name.isupper()}, made


LASTING = 3  # meshes; the threads of more groups would take more time than it takes to make them again
_ENTERED: dict[tuple, tuple[dict, set]] = {}
ALONE = Mesh()


def config(mesh: Mesh, moe: bool = False, **changes) -> TransformerConfig:
    options = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 24,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.1,  # larger, and fp32 is chaotic within three steps
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": mesh.tp,
        "context_parallel_size": mesh.cp,
        "pipeline_model_parallel_size": mesh.pp,
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.etp,
        "sequence_parallel": mesh.tp > 1,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": True,
    }
    if moe:
        options |= {
            "num_moe_experts": 4,
            "moe_layer_freq": 2,
            "moe_ffn_hidden_size": 12,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(**(options | changes))


def gpt(
    mesh: Mesh,
    mixer: str = "gated_delta_net",
    moe: bool = False,
    pattern: str = "LLLN",
    vocabulary: int = VOCABULARY,
    **changes,
) -> GPTModel:
    shape = config(mesh, moe, **changes)
    return GPTModel(
        shape,
        gpt_layer_specs(shape, pattern, mixer=mixer),
        vocabulary,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def hybrid(mesh: Mesh, mixer: str = "gated_delta_net", moe: bool = False, **changes):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from lasp.integrations.megatron.hybrid import hybrid_pattern, hybrid_stack_spec

    shape = config(mesh, moe, num_layers=8, **changes)
    pattern = hybrid_pattern(shape)
    return HybridModel(
        shape,
        hybrid_stack_spec(shape, pattern, mixer=mixer),
        VOCABULARY,
        LENGTH,
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )


def draw_batches(gen: torch.Generator) -> list[dict[str, Tensor]]:
    """STEPS global batches; sequences have unequal numbers of tokens that count."""
    batches = []
    for _ in range(STEPS):
        tokens, labels = (torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=gen) for _ in range(2))
        mask = (torch.rand(SEQUENCES, LENGTH, generator=gen) < torch.linspace(0.5, 1, SEQUENCES)[:, None]).float()
        positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
        batches.append({"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions})
    return batches


def row(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: x[index : index + 1] for name, x in batch.items()}


def loss_of(model, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])


def train_alone(model, batches) -> list[float]:
    """Losses of STEPS steps of SGD, with nothing of Megatron's but the model; the last gradient stays in `grad`."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as the schedules do
    losses = []
    for batch in batches:
        model.zero_grad()
        total = sum((loss_of(model, row(batch, i)) * batch["loss_mask"][i]).sum() for i in range(SEQUENCES))
        count = batch["loss_mask"].sum()
        total.backward()
        losses.append((total / count).item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad /= count
                parameter -= LR * parameter.grad
    return losses


def train_on_mesh(model, batches, optimizer: str = "sgd", distributed: bool = False) -> list[float]:
    """The same steps by Megatron's schedules, gradient reductions and optimizer; gradients stay in `main_grad`."""
    shape = model.config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, overlap_grad_reduce=False)
    model = DistributedDataParallel(shape, ddp, model)
    shape.finalize_model_grads_func = finalize_model_grads
    steps = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=optimizer,
            lr=LR if optimizer == "sgd" else LR / 10,
            min_lr=LR if optimizer == "sgd" else LR / 10,
            weight_decay=0.0,
            sgd_momentum=0.0,
            clip_grad=1e9,
            use_distributed_optimizer=distributed,
        ),
        [model],
    )
    data, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = []
    for batch in batches:
        model.zero_grad_buffer()
        steps.zero_grad()
        mine = iter([row(batch, i) for i in range(data, SEQUENCES, ranks)])
        seen = get_forward_backward_func()(
            forward_step_func=partial(forward_step, batch["loss_mask"].sum()),
            data_iterator=mine,
            model=[model],
            num_microbatches=SEQUENCES // ranks,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        successful, _, _ = steps.step()
        assert successful
        losses.append(mean_loss(seen))
    return losses


def forward_step(step_count: Tensor, data_iterator, model):
    batch = shard_batch(next(data_iterator), parallel_state.get_context_parallel_group())
    mask = batch["loss_mask"]
    per_token = model.config.calculate_per_token_loss
    return loss_of(model, batch), partial(count_loss, mask) if per_token else partial(average_loss, mask, step_count)


def count_loss(mask: Tensor, losses: Tensor):
    total, count = (losses * mask).sum(), mask.sum().int()
    return total, count, torch.stack([total.detach(), count.float()])


def average_loss(mask: Tensor, step_count: Tensor, losses: Tensor):
    """A 2-tuple: Megatron multiplies it by CP and averages it over microbatches and over data and context ranks."""
    total, _, both = count_loss(mask, losses)
    return total * SEQUENCES / step_count, both


def mean_loss(seen: list[Tensor]) -> float:
    """Of the whole batch; the last stage tells the others."""
    both = torch.stack(seen).sum(0) if seen else torch.zeros(2)
    torch.distributed.all_reduce(both, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(both, group=parallel_state.get_pipeline_model_parallel_group())
    return (both[0] / both[1]).item()


def save(model, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load(model, folder: Path) -> None:
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)), strict=False)


def save_gradient(model, folder: Path) -> None:
    """The last gradient, in the place of the weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else parameter.main_grad)
    save(model, folder)


def check_gradient(got_folder: Path, wanted_folder: Path, tolerance: float) -> None:
    """The error is at most `tolerance` of the whole gradient, and ten times that of every tensor.

    Single small tensors (the gates' A_log above all) are sums that nearly cancel: fp32 itself is off by 1e-5 there.
    """
    got, wanted = (dist_checkpointing.load_plain_tensors(str(folder)) for folder in (got_folder, wanted_folder))
    wanted = {name: x for name, x in wanted.items() if x.is_floating_point()}
    errors = {name: (got[name] - x).norm() for name, x in wanted.items()}
    norms = {name: x.norm() for name, x in wanted.items()}
    assert all(norm > 0 for norm in norms.values())
    worst = max(errors, key=lambda name: errors[name] / norms[name])
    assert errors[worst] <= 10 * tolerance * norms[worst], worst
    assert torch.stack([*errors.values()]).norm() <= tolerance * torch.stack([*norms.values()]).norm()
