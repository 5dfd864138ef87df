"""Where the ranks of a group are, and what their links cost."""

import socket

from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.cost import Costs


def topology(group: Group) -> tuple[Costs, bool]:
    """What links cost, by rank 0's calibration, and whether the group is on one machine; the same on all ranks."""
    if group is None or comm.size(group) == 1:
        return Costs(), True
    facts = comm.gather_objects((Costs.read(), socket.gethostname()), group)
    return facts[0][0], len({host for _, host in facts}) == 1
