"""Single layers over tensor- and context-parallel ranks equal lasp's own on one rank, in float64; and generation."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from lasp.config import LOG_LINEAR, MIXERS
from lasp.integrations.megatron import LinearCoreAttention, LinearSelfAttention, SoftmaxCoreAttention
from lasp.integrations.megatron.sequence import context_parallel
from lasp.integrations.megatron.tensor_parallel import partition_dim
from tests.integrations import megatron_models as models
from tests.integrations.megatron_models import ALONE, Mesh

TOLERANCE = 1e-10
MESH = Mesh(tp=2, cp=2)
TOKENS, DOCUMENTS = 48, (0, 12, 12, 32, 48)  # per rank and unit: 3, 0, 5 and 4 tokens


def packed_params(packed: bool) -> PackedSeqParams | None:
    offsets = torch.tensor(DOCUMENTS, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets) if packed else None


def groups() -> ProcessGroupCollection:
    return ProcessGroupCollection.use_mpu_process_groups()


def float64(mesh: Mesh, **changes):
    return models.config(mesh, params_dtype=torch.float64, **changes)


def draw(gen: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


@pytest.fixture
def four(ranks):
    if ranks.size != 4:
        pytest.skip("wants 4 ranks")


def share(x: torch.Tensor, dim: int) -> torch.Tensor:
    """This tensor-parallel rank's part."""
    return x.chunk(MESH.tp, dim)[parallel_state.get_tensor_model_parallel_rank()]


@pytest.mark.mpi
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_self_attention_equals_one_rank(gen, four, mixer, packed, sequence_parallel):
    if packed and sequence_parallel:
        pytest.skip("each alone is enough")
    tokens = TOKENS
    if mixer.startswith(LOG_LINEAR):
        tokens = 64  # of which every unit has 16
        if packed:
            pytest.skip("is refused: see below")
    batch, params = 1 if packed else 2, packed_params(packed)
    x, d = (draw(gen, tokens, batch, 16) for _ in range(2))
    ALONE.enter()
    torch.manual_seed(1)
    whole = LinearSelfAttention(float64(ALONE), 2, mixer, value_head_dim=6, pg_collection=groups())
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * draw(gen, *parameter.shape))
    x_whole = x.clone().requires_grad_()
    wanted, _ = whole(x_whole, packed_seq_params=params)
    wanted.backward(d)

    MESH.enter()
    config = float64(MESH, sequence_parallel=sequence_parallel)
    layer = LinearSelfAttention(config, 2, mixer, value_head_dim=6, pg_collection=groups())
    source = dict(whole.mixer.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.mixer.named_parameters():
            dim = partition_dim(name)
            parameter.copy_(source[name] if dim is None else share(source[name], dim))
    seq = context_parallel(groups().cp).sequence(tokens // MESH.cp, params)
    local, d_local = (seq.shard(t, dim=0) for t in (x, d))
    if sequence_parallel:
        local, d_local = share(local, 0), share(d_local, 0)
    local = local.clone().requires_grad_()
    got, bias = layer(local, packed_seq_params=params)
    assert bias is None
    got.backward(d_local)

    expected, expected_grad = (seq.shard(t.detach(), dim=0) for t in (wanted, x_whole.grad))
    if sequence_parallel:
        expected, expected_grad = share(expected, 0), share(expected_grad, 0)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(local.grad, expected_grad, rtol=0, atol=TOLERANCE)
    for name, parameter in layer.mixer.named_parameters():
        dim, grad = partition_dim(name), source[name].grad
        dist.all_reduce(parameter.grad, group=groups().cp)
        torch.testing.assert_close(
            parameter.grad, grad if dim is None else share(grad, dim), rtol=0, atol=TOLERANCE * grad.norm(), msg=name
        )


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (False, "sequence: got units of 12 tokens, expected a power of two"),
        (True, "sequence: got documents that are cut"),
    ],
)
def test_levels_need_units_of_a_power_of_two_tokens(gen, four, packed, message):
    MESH.enter()
    config = float64(MESH, sequence_parallel=False)
    layer = LinearSelfAttention(config, 2, "log_linear_mamba2", pg_collection=groups())
    batch, params = draw(gen, TOKENS // MESH.cp, 1, 16), packed_params(packed)
    with pytest.raises(ValueError, match=message):
        layer(batch, packed_seq_params=params)


CORES = {"softmax": SoftmaxCoreAttention} | {
    kind: lambda *args, kind=kind, **kwargs: LinearCoreAttention(*args, kind=kind, **kwargs)
    for kind in LinearCoreAttention.KINDS
}


@pytest.mark.mpi
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("core", CORES)
def test_core_attention_equals_one_rank(gen, four, core, packed):
    params = packed_params(packed)
    rows = () if packed else (2,)
    heads = {"query": 4, "key": 2, "value": 2}
    whole = {name: draw(gen, TOKENS, *rows, count, 8) for name, count in heads.items()}
    d = draw(gen, TOKENS, *rows, 4 * 8)

    def run(mesh: Mesh, cut):
        module = CORES[core](
            config=float64(mesh),
            layer_number=2,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=groups(),
        )
        leaves = {name: cut(x, -2).clone().requires_grad_() for name, x in whole.items()}
        o = module(*leaves.values(), None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
        o.backward(cut(d, -1))
        return o.detach(), {name: x.grad for name, x in leaves.items()}, dict(module.named_parameters())

    ALONE.enter()
    wanted, wanted_grads, parameters = run(ALONE, lambda x, dim: x)
    MESH.enter()
    seq = context_parallel(groups().cp).sequence(TOKENS // MESH.cp, params)

    def cut(x, dim):
        return share(seq.shard(x, dim=0), dim)

    got, grads, mine = run(MESH, cut)
    torch.testing.assert_close(got, cut(wanted, -1), rtol=0, atol=TOLERANCE)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, cut(wanted_grads[name], -2), rtol=0, atol=TOLERANCE, msg=name)
    for name, parameter in mine.items():
        dist.all_reduce(parameter.grad, group=groups().cp)
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("mixer", ["kda", "mamba2", "retention"])
def test_checkpoints_are_resharded_bit_for_bit(four, shared_tmp_path, mixer):
    """One rank's weights, on a mesh and back; every mesh of one seed starts with the same."""
    ALONE.enter()
    torch.manual_seed(3)
    models.save(models.gpt(ALONE, mixer), shared_tmp_path / "one")
    MESH.enter()
    torch.manual_seed(3)
    model = models.gpt(MESH, mixer)
    models.save(model, shared_tmp_path / "fresh")
    models.load(model, shared_tmp_path / "one")
    models.save(model, shared_tmp_path / "many")
    one, many, fresh = (
        dist_checkpointing.load_plain_tensors(str(shared_tmp_path / name)) for name in ("one", "many", "fresh")
    )
    assert one.keys() == many.keys() == fresh.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name]), name
        if ".mixer." in name:
            assert torch.equal(tensor, fresh[name]), name


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_initialisation_without_a_whole_copy(four):
    """As on GPUs: what every tensor-parallel rank has whole is the same on all of them."""
    MESH.enter()
    torch.manual_seed(4)
    config = models.config(MESH, use_cpu_initialization=False)
    for mixer in ("kda", "mamba2"):
        layer = LinearSelfAttention(config, 1, mixer, pg_collection=groups())
        for name, parameter in layer.mixer.named_parameters():
            assert getattr(parameter, "tensor_model_parallel", False) == (partition_dim(name) is not None)
            if partition_dim(name) is None:
                both = [torch.empty_like(parameter) for _ in range(MESH.tp)]
                dist.all_gather(both, parameter.detach(), group=groups().tp)
                assert torch.equal(*both)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("mixer", ["gated_delta_net", "mamba2", "retention"])
def test_generation_equals_the_whole_forward(gen, four, mixer):
    """Logits token by token, from states kept in Megatron's inference context, are those of the whole sequence."""
    ALONE.enter()
    torch.manual_seed(5)
    model = models.gpt(ALONE, mixer).eval()
    tokens = torch.randint(models.VOCABULARY, (2, 11), generator=gen)
    positions = torch.arange(11).expand(2, -1)
    with torch.no_grad():
        wanted = model(tokens, positions, None)
        for _ in range(2):  # a context that is used again starts anew
            context = StaticInferenceContext(2, 16)
            context.materialize_only_last_token_logits = False
            got = []
            for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 11))):
                step = slice(start, stop)
                got.append(
                    model(
                        tokens[:, step], positions[:, step], None, inference_context=context, runtime_gather_output=True
                    )
                )
                context.sequence_len_offset = stop
            torch.testing.assert_close(torch.cat(got, dim=1), wanted, rtol=0, atol=1e-5)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_bad_batches_are_refused_on_every_rank(four):
    Mesh(cp=4).enter()
    config = float64(Mesh(cp=4))
    layer = LinearSelfAttention(config, 1, "gla", pg_collection=groups())
    with pytest.raises(ValueError, match="sequence length: got 9, expected a multiple of 4 context-parallel ranks"):
        models.shard_batch({"tokens": torch.zeros(1, 9)}, groups().cp)
    x = torch.zeros(3, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 12, expected a multiple of 2 · context_parallel_size = 8"):
        layer(x)
    uneven = torch.tensor([0, 4, 16])
    with pytest.raises(ValueError, match="document length: got 4, expected a multiple of the 8 units"):
        layer(x[:2].repeat(2, 1, 1), packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=uneven))
    with pytest.raises(ValueError, match="cu_seqlens: got 16, expected 24"):
        layer(x.repeat(2, 1, 1), packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=uneven))
    with pytest.raises(ValueError, match="context_parallel_size: got 4, expected 1 in generation"):
        layer(torch.zeros(2, 1, 16, dtype=torch.float64), inference_context=StaticInferenceContext(1, 16))
    dynamic = SimpleNamespace(is_static_batching=lambda: False)
    with pytest.raises(ValueError, match="expected a StaticInferenceContext"):
        layer(torch.zeros(2, 1, 16, dtype=torch.float64), inference_context=dynamic)
