"""Which settings fit, and which of them is the fastest."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lasp.config import require
from lasp.models import flops_per_token
from lasp.models.recompute import POLICIES
from lasp.plan import memory, seconds
from lasp.plan.gpus import GIB
from lasp.plan.memory import Memory
from lasp.plan.setting import Job, Setting

SURE = 0.9  # of what is usable is planned with, unless asked for more
SHORTEST_SEGMENT = 16_384  # tokens of a rank: with fewer, products and kernels are slow


@dataclass(frozen=True)
class Plan:
    """A setting and what is expected of it. step: seconds by what takes them."""

    job: Job
    setting: Setting
    memory: Memory
    step: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.job.gpu.usable

    @property
    def surely_fits(self) -> bool:
        """Also if the prediction is wrong by a tenth."""
        return self.memory.total <= SURE * self.job.gpu.usable

    @property
    def seconds(self) -> float:
        return sum(self.step.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        sequences = self.job.gpus // self.setting.sequence_parallel * self.job.accumulated
        return sequences * self.job.context / self.seconds

    @property
    def utilisation(self) -> float:
        """Of the GPUs' dense peak, by the model's FLOPs."""
        flops = flops_per_token(self.job.model, self.job.context) * self.tokens_per_second
        return flops / (self.job.gpus * self.job.gpu.flops)


def plan(job: Job, setting: Setting) -> Plan:
    """ValueError for a setting that does not fit the job."""
    ranks, segment = setting.sequence_parallel, setting.segment_tokens
    require(job.gpus % ranks == 0, "sequence_parallel", ranks, f"a divisor of the {job.gpus} GPUs")
    expected = "False with recompute='none', where nothing is recomputed"
    wrong = setting.offload_activations and setting.recompute == "none"
    require(not wrong, "offload_activations", True, expected)
    require(segment is None or segment >= ranks, "segment_tokens", segment, f"at least {ranks}, a token for each rank")
    stream = segment is not None or not setting.segment_offload
    require(stream, "segment_offload", True, "False without segment_tokens")
    graphs = setting.segment_graphs
    require(segment is not None or graphs == 1, "segment_graphs", graphs, "1 without segment_tokens")
    require(graphs >= 1, "segment_graphs", graphs, "at least 1")
    return Plan(job, setting, memory.predict(job, setting), seconds.predict(job, setting))


def best(job: Job, setting: Setting | None = None) -> Plan:
    """The fastest that surely fits (or else fits), of settings with as many ranks to a context as `setting` if it is
    given; where none does, that which needs the least memory. Of equals the simplest."""
    ranks = [n for n in range(1, job.gpus + 1) if job.gpus % n == 0] if setting is None else [setting.sequence_parallel]
    return faster(*(plan(job, each) for each in settings(job, ranks)))


def faster(*plans: Plan) -> Plan:
    """The fastest that surely fits, or else fits; where none does, that which needs the least memory. Of equals the
    first."""
    fitting = [each for each in plans if each.surely_fits] or [each for each in plans if each.fits]
    if not fitting:
        return min(plans, key=lambda each: each.memory.total)
    return max(fitting, key=lambda each: each.tokens_per_second)


def smaller(made: Plan) -> Plan | None:
    """The fastest that needs at most four fifths of a plan's memory, and fits, on the same GPUs; None if none does."""
    plans = [plan(made.job, each) for each in settings(made.job, [made.setting.sequence_parallel])]
    enough = min(0.8 * made.memory.total, made.job.gpu.usable)
    return max((p for p in plans if p.memory.total <= enough), key=lambda p: p.tokens_per_second, default=None)


def settings(job: Job, ranks: list[int]) -> Iterator[Setting]:
    """From the simplest on, each with as little recomputation as surely fits, and with as much as there is."""
    either = (False, True)
    for sequence_parallel, streamed, handed_on, offload in product(ranks, either, either, either):
        if handed_on and not streamed:
            continue
        shortest = SHORTEST_SEGMENT * sequence_parallel if streamed else job.context
        segment = job.context // 2 if streamed else job.context
        while segment >= shortest:
            setting = Setting(
                sequence_parallel=sequence_parallel,
                offload_activations=offload,
                segment_tokens=segment if streamed else None,
                segment_offload=handed_on,
            )
            yield recomputation(job, setting)
            yield with_graphs(job, replace(setting, recompute=POLICIES[-1]))
            segment //= 2


def with_graphs(job: Job, setting: Setting) -> Setting:
    """The setting, with as many of its segments computed once as surely fit."""
    numbers = range(2, memory.segments(job, setting) + 1)
    more = bisect_left(numbers, True, key=lambda n: not plan(job, replace(setting, segment_graphs=n)).surely_fits)
    return replace(setting, segment_graphs=1 + more)


def recomputation(job: Job, setting: Setting) -> Setting:
    """What `recompute: auto` stands for: the setting with the first policy that surely fits, for as few layers as it
    takes; with the last policy if none does."""
    for policy in POLICIES[1:] if setting.offload_activations else POLICIES:
        setting = replace(setting, recompute=policy, recompute_layers=None)
        if plan(job, setting).surely_fits:
            break
    else:
        return setting
    first = POLICIES[int(setting.offload_activations)]
    if setting.recompute == first:
        return setting
    number = bisect_left(
        range(job.model.num_layers), True, key=lambda n: plan(job, replace(setting, recompute_layers=n)).surely_fits
    )
    return setting if number == job.model.num_layers else replace(setting, recompute_layers=number)


def gpus_needed(job: Job, most: int = 4096) -> Plan | None:
    """The best plan on as many times the GPUs, doubled, as it takes; None if there is none up to so many."""
    while job.gpus <= most:
        found = best(job)
        if found.fits:
            return found
        job = replace(job, gpus=2 * job.gpus)
    return None


def advice(made: Plan) -> str:
    """One line: what fits in the place of a plan that does not, or what is faster than one that does."""
    found = best(made.job, made.setting)
    if not found.fits:
        wider = best(made.job)
        found = wider if wider.fits else gpus_needed(made.job) or wider
    if not found.fits:
        return f"no setting fits on up to {found.job.gpus} GPUs: a smaller model or context"
    if found.setting == made.setting and found.job == made.job:
        return "nothing: this is the fastest setting that fits"
    gpus = f"{found.job.gpus} GPUs" if found.job.gpus != made.job.gpus else ""
    changes = [change for change in (gpus, options(found.setting, made.setting)) if change]
    return f"{', '.join(changes)} ({found.memory.total / GIB:.1f} GiB, {found.seconds:.2f} s a step)"


def options(setting: Setting, other: Setting | None = None) -> str:
    """As `lasp train` takes them; those alone that differ from another setting's, if there is one."""
    told = []
    for field, value in vars(setting).items():
        if other is not None and value == getattr(other, field):
            continue
        if field == "segment_graphs" and setting.segment_tokens is None:
            continue
        name = {"sequence_parallel": "parallel.sequence-parallel"}.get(field, field.replace("_", "-"))
        if isinstance(value, bool):
            told += [f"--{name}"] * value or [f"--no-{name}"] * (other is not None)
        elif value is not None or other is not None:
            told += [f"--{name} {value}"]
    return " ".join(told)
