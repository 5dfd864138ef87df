"""The processes of one multi-rank launch: their store, their process groups, and one verdict for each test.

Ranks agree on a test through the key-value store, not through a process group: it answers while a collective is stuck.
"""

import json
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor.debug


class WrongOnSomeRank(AssertionError):
    """A test's assertion failed on at least one rank, and nothing else went wrong; raised on every rank."""


class ErrorOnSomeRank(RuntimeError):
    """A test raised something else than a failed assertion on at least one rank; raised on every rank."""


class Ranks:
    """Started by mpirun or torchrun; `rank` of `size`. `groups` maps a name to the group of it that this rank is in.

    gpu: the ranks, of one machine, have a GPU each, on which tensors are made, and NCCL groups.
    """

    def __init__(self, timeout: float, gpu: bool = False) -> None:
        self.timeout = timedelta(seconds=timeout)
        self.rank, self.size, self.store = _connect()
        self.device = torch.device("cuda", self.rank) if gpu else None
        if gpu:
            torch.cuda.set_device(self.device)
            torch.set_default_device(self.device)
        self.store.set_timeout(2 * self.timeout)  # longer than a collective takes to give up
        self.broken = False
        self.generation = 0
        self.groups: dict[str, dist.ProcessGroup | None] = {}
        self.open_groups()

    def open_groups(self) -> None:
        """The world, and from three ranks on subgroups in which rank and group rank differ, all working at once."""
        store = dist.PrefixStore(f"generation {self.generation}", self.store)
        dist.init_process_group(
            "nccl" if self.device else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self.timeout,
            device_id=self.device,
        )
        self.groups = {"world": dist.group.WORLD}
        if self.size >= 3:
            everyone = range(self.size)
            members = [[r for r in everyone if r % 2 == 0], [r for r in everyone if r % 2 == 1]]
            self.groups["subgroup"], _ = dist.new_subgroups_by_enumeration(members, timeout=self.timeout)

    def renew_groups(self) -> None:
        """Forgets whatever a failed test left in flight, so that no later collective pairs with it."""
        dist.destroy_process_group()
        self.generation += 1
        self.open_groups()

    def end_groups(self, but: set[dist.ProcessGroup]) -> None:
        """All others, if they are gloo's, each of which has threads that wake a hundred times a second."""
        if self.device or not (others := self.made_groups() - but):
            return
        torch.distributed.tensor.debug._clear_sharding_prop_cache()  # it knows meshes of these groups
        for group in others:
            dist.destroy_process_group(group)

    def made_groups(self) -> set[dist.ProcessGroup]:
        return set(dist.distributed_c10d._world.pg_map)

    def broadcast(self, key: str, value: str) -> str:
        """Rank 0's value; `key` is used once."""
        if self.rank == 0:
            self.store.set(key, value)
        return self.store.get(key).decode()

    def barrier(self, key: str) -> None:
        """Waits until every rank has come here; `key` is used once."""
        self.store.set(f"{key} {self.rank}", "here")
        self.store.wait([f"{key} {rank}" for rank in range(self.size)])

    def settle(self, test: str, error: BaseException | None) -> None:
        """Tells the others how `test` ended here and waits for them; raises on every rank if it failed on any."""
        __tracebackhide__ = True
        self.store.set(f"{test} on {self.rank}", json.dumps(_verdict(error)))
        verdicts = [self._verdict_of(rank, test) for rank in range(self.size)]
        failures = {rank: verdict for rank, verdict in enumerate(verdicts) if verdict[0] in ("wrong", "error")}
        if failures:
            self.renew_groups()
            story = "\n".join(f"rank {rank}: {message}" for rank, (_, message) in failures.items())
            kind = ErrorOnSomeRank if any(kind == "error" for kind, _ in failures.values()) else WrongOnSomeRank
            raise kind(f"failed on {len(failures)} of {self.size} ranks\n{story}") from error

    def _verdict_of(self, rank: int, test: str) -> tuple[str, str]:
        try:
            return json.loads(self.store.get(f"{test} on {rank}"))
        except RuntimeError as gone:
            self.broken = True
            pytest.exit(f"rank {rank} did not finish {test}: {gone}", returncode=3)


def _verdict(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return "passed", ""
    if isinstance(error, pytest.skip.Exception):
        return "skipped", ""
    kind = "wrong" if isinstance(error, AssertionError | pytest.fail.Exception) else "error"
    return kind, f"{type(error).__name__}: {error}"


def launched() -> bool:
    """Whether mpirun or torchrun started this process."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _connect() -> tuple[int, int, dist.Store]:
    """Rank, world size and a store that all ranks share."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, rank, size = next(dist.rendezvous("env://"))
        return rank, size, store
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(server.port if server else None)
    return comm.rank, comm.size, server or dist.TCPStore("127.0.0.1", port, is_master=False)
