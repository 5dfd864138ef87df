"""Starts the ranks of one node, and starts them again when one dies:   python launch/elastic.py RANKS ARGUMENTS…

ARGUMENTS are Python's: `-m lasp.cli train quickstart`. It is torchrun (PyTorch's elastic agent), but in how things end:

    told to stop       a signal goes on to the ranks, which end by themselves; a second one gives them 30 seconds
    stopped, refused   ranks that stopped with a checkpoint (exit code 75, then also the launcher's) or were refused
                       what they asked for (ValueError, FileNotFoundError, a wrong command line) are not started again
    killed             the ranks end with their launcher

From the environment: NNODES (1; a range as 2:4), MASTER_ADDR, MASTER_PORT (29500) of a node, RUN_ID, MAX_RESTARTS (3):
so many until ranks have lived for an hour, and then again.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lasp.launched import EXIT_CODE, LAUNCHER, SIGNALS

WRONG_COMMAND_LINE = 2
LONG = 3600.0  # seconds: ranks that lived for so long have not died of what they died of before
REFUSED = ("ValueError", "FileNotFoundError")


class Agent(LocalElasticAgent):
    told: int | None = None  # the signal to stop that came
    began = 0.0  # when the ranks were started last

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs):
        super().__init__(spec, logs)
        self.restarts = spec.max_restarts

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        hangup = signal.getsignal(signal.SIGHUP)
        self.began = time.monotonic()
        started = super()._start_workers(worker_group)
        for number in (*SIGNALS, signal.SIGHUP):  # in place of the agent's own
            signal.signal(number, self._pass_on)
        if hangup is signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, hangup)
        return started

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        group, first = self.get_worker_group(), self.told is None
        self.told, self._remaining_restarts = number, 0
        if not first or group.state != WorkerState.HEALTHY:
            raise SignalException(f"got {signal.Signals(number).name}", signal.SIGTERM)
        for worker in group.workers:
            with suppress(ProcessLookupError):
                os.kill(worker.id, number if number in SIGNALS else signal.SIGTERM)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if was_stopped(result) or all(map(is_refused, result.failures.values())):
                self._remaining_restarts = 0
            elif self.told is None and time.monotonic() - self.began >= LONG:
                again = self.restarts - self._remaining_restarts
                worker_group.spec.max_restarts += again  # restarts are numbered by what is left of these
                self._remaining_restarts += again
        return result


def was_stopped(result: RunResult) -> bool:
    return any(failure.exitcode == EXIT_CODE for failure in result.failures.values())


def is_refused(failure: ProcessFailure) -> bool:
    """Whether a rank could not do what it was asked for, or had no time to say so before the agent ended it."""
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return failure.exitcode in (WRONG_COMMAND_LINE, -signal.SIGTERM) or said.startswith(REFUSED)


def make_agent(ranks: int, arguments: list[str], folder: str) -> Agent:
    """folder: where ranks leave word of their errors."""
    fewest, _, most = os.environ.get("NNODES", "1").partition(":")
    alone = (fewest, most) == ("1", "")
    endpoint = "localhost:0" if alone else os.environ["MASTER_ADDR"]
    if ":" not in endpoint:
        endpoint += f":{os.environ.get('MASTER_PORT', 29500)}"
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id=str(os.getpid()) if alone else os.environ.get("RUN_ID", "lasp"),
        min_nodes=int(fewest),
        max_nodes=int(most or fewest),
        local_addr="localhost" if alone else None,
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=("-u", *arguments),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=int(os.environ.get("MAX_RESTARTS", 3)),
        monitor_interval=0.1,
        local_addr=rendezvous.local_addr,
    )
    return Agent(spec, DefaultLogsSpecs(folder))


@record
def main() -> None:
    ranks, *arguments = sys.argv[1:]
    # Where agent and ranks share a store, gloo's ranks do not find each other after a restart.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks of a machine share its cores
    os.environ[LAUNCHER] = str(os.getpid())
    with TemporaryDirectory(prefix="lasp-") as folder:
        agent = make_agent(int(ranks), arguments, folder)
        shutdown = agent.get_worker_group().spec.rdzv_handler.shutdown
        try:
            result = agent.run()
        except SignalException:
            sys.exit(128 + (agent.told or signal.SIGTERM))
    if was_stopped(result):
        sys.exit(EXIT_CODE)
    if result.is_failed() and agent.told is not None:  # before the first step, or after the last one
        sys.exit(128 + agent.told)
    shutdown()
    if result.is_failed():
        raise ChildFailedError(" ".join(arguments), result.failures)


if __name__ == "__main__":
    main()
