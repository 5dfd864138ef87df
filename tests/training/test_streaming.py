"""Training in segments, on one rank: the run is that without them, and what is kept does not grow with the context."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lasp.config import ParallelConfig
from lasp.kernels import softmax
from lasp.kernels.keys import KeyStore
from lasp.kernels.parked import Parked
from lasp.models import Decoder
from lasp.models.carried import Carried
from lasp.parallel import SequenceParallel, Stream
from lasp.plan import GPUS, Job, Setting, host, plan
from lasp.plan.memory import handed_on
from lasp.training import host_memory
from lasp.training.metrics import read_metrics
from lasp.training.streaming import StreamedBatch
from lasp.training.train import train
from tests.models.helpers import MODELS, decoder, random_tokens
from tests.models.helpers import config as config_of
from tests.patience import PATIENCE

TOKENS, DOCUMENTS = 29, (0, 3, 3, 20, 24, 29)


def streamed(tokens, segment_tokens, documents=None, rows=1, graphs=1):
    offsets = None if documents is None else torch.tensor(documents)
    stream = Stream(SequenceParallel(None), tokens, segment_tokens, offsets)
    return StreamedBatch.of(stream, random_tokens(rows, tokens), random_tokens(rows, tokens), graphs=graphs)


@pytest.mark.parametrize(("segment_tokens", "documents", "graphs"), [(8, DOCUMENTS, 1), (5, None, 3)])
@pytest.mark.parametrize(("mixer", "pattern"), MODELS)
def test_gradients_are_those_of_one_segment(mixer, pattern, segment_tokens, documents, graphs):
    model = decoder(mixer, pattern)
    batch = streamed(TOKENS, segment_tokens, documents, graphs=graphs)
    tokens, labels = (torch.cat(whole, dim=1) for whole in zip(*batch.parts, strict=True))
    seq = SequenceParallel(None).sequence(TOKENS, None if documents is None else torch.tensor(documents))
    loss, _ = model(tokens, seq, labels=labels)
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert batch.backward(model, 1).item() == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-10 * wanted[name].norm(), name


def test_the_head_sees_labelled_tokens_alone(monkeypatch):
    model, (tokens, labels) = decoder("gla", "LN"), (random_tokens(1, TOKENS) for _ in "tl")
    labels[:, 9:] = -100
    labels[0, 20] = 5
    sp, rows = SequenceParallel(None), []
    loss, count = model(tokens, sp.sequence(TOKENS), labels=labels)
    loss.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    real = model._loss

    def spying(x, labels):
        rows.append(labels.numel())
        return real(x, labels)

    monkeypatch.setattr(model, "_loss", spying)
    batch = StreamedBatch.of(Stream(sp, TOKENS, 8), tokens, labels)
    assert batch.backward(model, 1).item() == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-10 * gradient.norm()
    assert rows == [0, 1, 1, 8]  # from the last segment to the first
    assert torch.stack(batch.loss(model)).tolist() == pytest.approx([loss.item(), count.item()])
    assert rows[4:] == [8, 1, 1, 0]


@pytest.mark.parametrize("edges", [(0, 48), (0, 21, 48)])
def test_blocks_of_whole_segments_come_again(monkeypatch, edges):
    """Those with a document's own edge do not, for which no kernel is to make plans."""
    asked, real = [], softmax.calls

    def spying(block, q, v, mask):
        asked.append((block.queries, block.keys, mask.comes_again(block)))
        return real(block, q, v, mask)

    monkeypatch.setattr(softmax, "calls", spying)
    tokens = random_tokens(1, 48)
    stream = Stream(SequenceParallel(None), 48, 8, torch.tensor(edges))
    StreamedBatch.of(stream, tokens, tokens).backward(decoder("gla", "N"), 1)
    assert {(8, 8, True)} <= set(asked)
    assert {each for each in asked if each[2]} == {(8, 8, True)}
    assert (len(edges) > 2) == (len(set(asked)) > 1)
    SequenceParallel(None).sequence(48, torch.tensor(edges)).softmax_attention(*[torch.ones(1, 48, 2, 4)] * 3)
    assert asked[-1][2] == (len(edges) == 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_of_segments_on_a_gpu_is_that_of_the_whole():
    """Whole segments of 2,048 tokens by cuDNN's kernels where there are any; in bf16, to 3 units of its rounding."""
    tokens, shapes = 7000, [(1, 7000, heads, 64) for heads in (4, 2, 2, 4)]
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    stream = Stream(SequenceParallel(None, device=q.device), tokens, 2048, torch.tensor([0, tokens]))
    store, outputs = KeyStore(), []
    for segment, (start, stop) in zip(stream, stream.ranges, strict=True):
        outputs.append(segment.softmax_attention(*(x[:, start:stop] for x in inputs), keys=store))
    for o, (start, stop) in reversed(list(zip(outputs, stream.ranges, strict=True))):
        o.backward(do[:, start:stop])
    whole = [x.detach().double().requires_grad_() for x in inputs]
    wanted, _ = softmax.softmax_attention(*whole)
    wanted.backward(do.double())
    pairs = [(torch.cat(outputs, dim=1), wanted), *((x.grad, y.grad) for x, y in zip(inputs, whole, strict=True))]
    errors = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]
    assert max(errors) < 3 * 2**-8, errors


def test_frozen_layers_hand_on_no_gradients():
    model, batch = decoder("mamba2", "LN"), streamed(TOKENS, 8)
    batch.backward(model, 1)
    wanted = {name: parameter.grad.clone() for name, parameter in model.layers[2:].named_parameters()}
    model.zero_grad()
    for part in (model.embedding, *model.layers[:2]):
        part.requires_grad_(False)
    batch.backward(model, 1)
    for name, parameter in model.layers[2:].named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-10, atol=0, msg=name)
    assert all(parameter.grad is None for parameter in model.layers[:2].parameters())


def test_a_stream_serves_many_steps():
    """What one step sums over the segments, or keeps of them, is not the next one's."""
    torch.manual_seed(0)
    mixture = {"num_experts": 4, "expert_intermediate_size": 16, "aux_loss_weight": 1.0}
    model = Decoder(replace(config_of("gated_delta_net", "LN"), **mixture)).double()
    batch = streamed(TOKENS, 8)
    batch.backward(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = StreamedBatch(Stream(SequenceParallel(None), TOKENS, 8), batch.parts, graphs=9)
    assert batch.backward(model, 1) == again.backward(model, 1)


class Alive(TorchDispatchMode):
    """The most bytes of tensors made in it that were alive at any time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self.watch, function(*args, **(kwargs or {})))

    def watch(self, x):
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        return x

    def forget(self, storage, size):
        self.known.discard(storage)
        self.now -= size


def most_alive(model, tokens, segment_tokens):
    batch = streamed(tokens, segment_tokens)
    batch.backward(model, 1)  # parameters have gradients from here on
    with Alive() as alive:
        batch.backward(model, 1)
    return alive.most


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_does_not_grow_with_the_context(recompute):
    model = decoder("linear", "L")
    model.checkpoint_layers = recompute
    short, long = most_alive(model, 128, 64), most_alive(model, 384, 64)
    state = 8 * model.config.num_heads * model.config.key_dim * model.config.value_dim
    assert long - short <= 2 * 4 * model.config.num_layers * state  # of four cuts more, with some slack
    assert long < 0.6 * most_alive(model, 384, 192)


def test_layers_are_recomputed_one_at_a_time():
    """What the ops of a recomputed layer hand on once more keeps nothing alive."""
    model = decoder("linear", "L")
    kept = most_alive(model, 128, 64)
    model.checkpoint_layers = True
    assert most_alive(model, 128, 64) < 0.65 * kept  # 0.62; 0.69 if it did


def test_what_is_carried_is_one_state_for_each_cut(monkeypatch):
    """However many documents there are; none where a cut lies between documents."""
    sizes = []
    keep = Carried.keep

    def look(self, past):
        keep(self, past)
        held = [parked._held for parked in self._parked(-1)]
        sizes.append(sum(x.untyped_storage().nbytes() for x in held) // 8)

    monkeypatch.setattr(Carried, "keep", look)
    model = decoder("gated_delta_net", "L")
    config = model.config
    channels = config.num_heads * (2 * config.key_dim + config.value_dim)
    each = config.num_heads * config.key_dim * config.value_dim + (config.conv_width - 1) * channels
    streamed(64, 16).backward(model, 1)
    assert sizes == [config.num_layers * each] * 3
    sizes.clear()
    streamed(32, 8, (0, 3, 7, 8, 24, 32)).backward(model, 1)
    assert sizes == [0, config.num_layers * each, 0]


def test_evaluation_keeps_the_last_segments_alone(monkeypatch):
    model = decoder("gated_delta_net", "LN").eval()
    stores, entered = [], []
    keep = Carried.keep

    def look(self, past):
        keep(self, past)
        entered.append(len(self._entered))
        stores.append({tuple(store._keys) for store in self.stores.values()})

    monkeypatch.setattr(Carried, "keep", look)
    streamed(24, 4, (0, 10, 24)).loss(model)
    assert max(entered) == 2
    assert stores == [{(0,)}, {(0, 1)}, {(0, 1, 2)}, {(2, 3)}, {(2, 3, 4)}, {(2, 3, 4)}]


def test_a_store_forgets_what_backward_has_taken():
    store, k = KeyStore(), torch.ones(1, 4, 2, 3)
    for segment in range(3):
        store.add(segment, k * segment, k)
    assert [(number, keys[0].mean().item()) for number, keys in store.visit(range(1, 3))] == [(1, 1.0), (2, 2.0)]
    for _ in range(2):
        for number, (_, _, *sums) in store.visit_sums(range(1)):
            store.store_sums(number, (k + sums[0], k) if sums else (k, k))
    assert store.take_sums(2) == () and 2 not in store
    dk, dv = store.take_sums(0)
    assert dk.mean() == 2 and dv.mean() == 1 and 0 not in store


def test_what_is_parked_keeps_no_larger_tensor_alive():
    whole = torch.ones(100, 3)
    assert Parked(whole[:2], on_host=True).fetch().wait().untyped_storage().nbytes() == 2 * 3 * 4
    assert Parked(whole, on_host=False).fetch().wait().data_ptr() == whole.data_ptr()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": True, "segment_offload": True},
        {"parallel": ParallelConfig(timeout=PATIENCE, fsdp=True), "segment_graphs": 2},
    ],
)
def test_a_run_in_segments_is_the_run_without(config, tmp_path, changes):
    config = replace(config, steps=3)
    in_segments = replace(config, run_dir=str(tmp_path / "segments"), segment_tokens=25, **changes)
    assert train(in_segments) == pytest.approx(train(config), rel=1e-10)
    whole, parts = (
        [(record["loss"], record["grad_norm"]) for record in read_metrics(run.run_dir) if "loss" in record]
        for run in (config, in_segments)
    )
    assert parts == [pytest.approx(step, rel=1e-10) for step in whole]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_tokens": 97}, "segment_tokens: got 97, expected at most context_length=96"),
        ({"segment_offload": True}, "segment_offload: got True, expected False without segment_tokens"),
        (
            {"segment_tokens": 3, "parallel": ParallelConfig(sequence_parallel=2, layout="zigzag", fsdp=False)},
            "segment_tokens: got 3, expected at least 4, a token for each unit of 2 ranks",
        ),
        (
            {"segment_tokens": 8, "engine": "deepspeed", "dtype": "float32"},
            "segment_tokens: got 8, expected None with engine='deepspeed'",
        ),
    ],
)
def test_segments_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_segments_must_fit_the_ranks_that_there_are(config):
    parallel = replace(config.parallel, sequence_parallel=None)
    run = replace(config, segment_tokens=3, parallel=parallel)
    assert run.mesh_shape(2) == (1, 2)
    with pytest.raises(ValueError, match="segment_tokens: got 3, expected at least 4"):
        run.mesh_shape(4)


def test_a_host_without_room_is_refused(config, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**10)
    run = replace(config, segment_tokens=25, segment_offload=True)
    with pytest.raises(ValueError, match="segment_offload: got True, expected False, or .* GiB of the host's memory"):
        train(run)
    run = replace(config, recompute="full", offload_activations=True)
    with pytest.raises(
        ValueError, match="offload_activations: got True, expected False, or .* GiB of the host's memory"
    ):
        train(run)


def test_models_without_what_streams_and_recomputation_call_are_refused(config):
    run = replace(config, model=replace(config.model, model_class="examples.own_model:Model"))
    expected = "expected None with a model_class that has no remember, begin, finish"
    with pytest.raises(ValueError, match=f"segment_tokens: got 25, {expected}"):
        train(replace(run, segment_tokens=25))
    with pytest.raises(ValueError, match="recompute: got 'full', expected 'none' with a model_class"):
        train(replace(run, recompute="full"))


def test_inputs_that_wait_on_the_host_are_counted_as_the_plan_does(config):
    """Of 48 tokens for each of two ranks, in three layers; and of 24 in two segments."""
    run = replace(config, recompute="full", recompute_layers=2, offload_activations=True)
    run = replace(run, dtype="float32", model=replace(run.model, num_layers=3, pattern="L", hidden_size=32))
    one = 2 ** (48 * 32 * 4 - 1).bit_length()
    assert host_memory.waiting_inputs_bytes(run, 2) == 3 * one  # the third keeps more, but is recomputed, too
    streamed = replace(run, segment_tokens=48, segment_graphs=2)
    half = 2 ** (24 * 32 * 4 - 1).bit_length()
    assert host_memory.waiting_inputs_bytes(streamed, 2) == 2 * 3 * half
    setting = Setting(sequence_parallel=2, recompute="full", recompute_layers=2, offload_activations=True)
    planned = plan(Job(model=run.model, context=run.context_length, gpu=GPUS["H200"], gpus=2, half=4), setting)
    assert planned.memory.host == 3 * one


def test_what_waits_on_the_host_is_counted(monkeypatch):
    model = decoder("linear", "LN")
    config, most = model.config, []
    take = KeyStore.take_sums

    def look(self, segment):
        of_segments = (self._keys, self._sums, self._seen)
        most.append([sum(x._held.nbytes for xs in each.values() for x in xs) for each in of_segments])
        return take(self, segment)

    monkeypatch.setattr(KeyStore, "take_sums", look)
    streamed(64, 16).backward(model, 1)
    states = 3 * 2 * 8 * config.num_heads * config.key_dim * config.value_dim  # of 3 cuts and 2 linear layers
    kept = 2 * sum(most[0]) * 64 // 48  # of 2 softmax layers; not of the last of 4 segments, or (seen) of the first
    counted = handed_on(config, context=64, ranks=1, segment_tokens=16, half=8)
    assert counted == {"boundary states": states, "key/value caches": kept}


def test_attention_to_earlier_segments_is_computed_once_forward(monkeypatch):
    """What a segment saw is kept, for when it is computed again, be it with its layers' recomputation."""
    model, visited = decoder("linear", "N"), []
    visit = KeyStore.visit

    def look(self, segments):
        visited.append(len(list(segments)))
        return visit(self, segments)

    monkeypatch.setattr(KeyStore, "visit", look)
    model.checkpoint_layers = True
    streamed(64, 16).backward(model, 1)
    assert sorted(filter(None, visited)) == sorted([1, 2, 3] * model.config.num_layers)


def test_available_memory_is_the_least_of_what_the_system_says(tmp_path, monkeypatch):
    meminfo, limit, usage, stat = (tmp_path / name for name in ("meminfo", "limit", "usage", "memory.stat"))
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:  64 kB\n")
    monkeypatch.setattr(host, "MEMINFO", meminfo)
    monkeypatch.setattr(host, "CONTROL_GROUPS", [(limit, usage, "inactive_file")])
    assert host.available_bytes() == 64 * 1024
    usage.write_text("1000\n")
    limit.write_text("max\n")
    assert host.available_bytes() == 64 * 1024
    limit.write_text("5000\n")
    assert host.available_bytes() == 4000
    stat.write_text("anon 500\ninactive_file 300\n")
    assert host.available_bytes() == 4300
    meminfo.unlink()
    limit.unlink()
    assert host.available_bytes() is None
