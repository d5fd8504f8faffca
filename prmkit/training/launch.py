"""How many processes train, and where: what train.py's flags for torchrun say, and which of them cannot be meant."""

import re
from dataclasses import dataclass

from prmkit.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """How many processes train, and where. Names and meanings are torchrun's."""

    nproc: int | None = None
    """Processes on this node; None takes one for each visible GPU."""
    nnodes: str = "1"
    """A number, or `MIN:MAX` for an elastic run."""
    node_rank: int = 0
    master_addr: str | None = None
    """Where the first node is; None for this machine."""
    master_port: int | None = None
    """None takes a free one on a single node, 29500 on several."""
    rdzv_id: str | None = None
    """Names an elastic run: nodes with the same one find each other at `master_addr`."""
    max_restarts: int = 0

    @property
    def is_first_node(self) -> bool:
        """This node writes the run folder and the record."""
        return self.node_rank == 0

    @property
    def most_nodes(self) -> int:
        """How many nodes there are; of an elastic run how many there may be."""
        return int(self.nnodes.rpartition(":")[2])


def refuse_nonsense(launch: Launch) -> None:
    """Refuse flags of torchrun that cannot be meant, all of them at once; torchrun would wait, or fail in its own way.

    Raises:
        UsageError: with one line a problem.
    """
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", launch.nnodes):
        raise UsageError(f"--nnodes {launch.nnodes}: expected a number, or MIN:MAX for an elastic run.")
    fewest, most = int(launch.nnodes.partition(":")[0]), launch.most_nodes
    problems = {
        f"--nproc {launch.nproc}: expected 1 or more": launch.nproc is not None and launch.nproc < 1,
        f"--nnodes {launch.nnodes}: the first number is the smaller one": fewest > most,
        f"--nnodes {launch.nnodes}: an elastic run needs --rdzv-id, the same on every node": ":" in launch.nnodes
        and launch.rdzv_id is None,
        "--nnodes: several nodes need --master-addr, the address of the first one": most > 1
        and launch.master_addr is None,
        f"--node-rank {launch.node_rank}: expected 0 to {most - 1}, as there are {most} nodes (--nnodes)": not 0
        <= launch.node_rank
        < most,
        f"--master-port {launch.master_port}: expected 1 to 65535": launch.master_port is not None
        and not 0 < launch.master_port < 65536,
        f"--max-restarts {launch.max_restarts}: expected 0 or more": launch.max_restarts < 0,
    }
    if found := [problem for problem, is_one in problems.items() if is_one]:
        raise UsageError("\n  ".join(found))
