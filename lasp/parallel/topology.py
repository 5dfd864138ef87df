"""Where the ranks of a group are, and what their links cost."""

import socket

from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Costs


def topology(group: Group) -> tuple[Costs, int]:
    """What links cost, by rank 0's calibration, and how many ranks share a machine (see `ranks_per_node`); the same on
    all ranks."""
    if group is None or comm.size(group) == 1:
        return Costs(), 1
    facts = comm.gather_objects((Costs.read(), socket.gethostname()), group)
    return facts[0][0], ranks_per_node([host for _, host in facts])


def ranks_per_node(hosts: list[str]) -> int:
    """Of ranks on these machines; 1 if machines do not have equally many, or not consecutive ones."""
    size = len(hosts) // len(set(hosts))
    machines = [set(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    return size if all(len(machine) == 1 for machine in machines) and len(machines) == len(set(hosts)) else 1
