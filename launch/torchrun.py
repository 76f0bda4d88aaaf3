"""``gr-launch torchrun``: one machine or several, through torch's own elastic launcher."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gr.distributed.network import address_towards, check_port_free, check_reachable, interface_of, split_endpoint
from gr.errors import UserError
from gr.launch.run import Command

MODULE = "gr.train"


@dataclass(frozen=True)
class Nodes:
    """Machines that train together; this one among them.

    Attributes:
        count: ``N``, or ``MIN:MAX`` for a run that goes on with fewer.
        rank: Of this machine; number 0 keeps the meeting place.
        endpoint: ``HOST:PORT`` of number 0.
        wait_s: How long the others wait for it to listen.
        survive_s: The longest cut of the network that launchers outlast; their workers start again after it.
    """

    count: str = "1"
    rank: int = 0
    endpoint: str = ""
    wait_s: float = 20.0
    survive_s: float = 300.0

    @property
    def least(self) -> int:
        """Fewest machines."""
        return int(self.count.partition(":")[0])

    @property
    def most(self) -> int:
        """Most machines."""
        return int(self.count.rpartition(":")[2])

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            UserError: As said.
        """
        parts = self.count.split(":")
        if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts) or self.least > self.most:
            raise UserError(f"--nnodes {self.count}: must be a number of machines, or MIN:MAX")
        if self.most > 1 and not self.endpoint:
            raise UserError(f"--nnodes {self.count} needs --rdzv HOST:PORT, where number 0 listens")
        if not 0 <= self.rank < self.most:
            raise UserError(f"--node-rank {self.rank}: must be at least 0 and below --nnodes {self.count}")

    def meet(self) -> None:
        """Sees that the meeting place can serve, or waits for it.

        Raises:
            UserError: Its port is in use on number 0, or it cannot be reached from another one.
        """
        if self.most > 1:
            host, port = split_endpoint(self.endpoint)
            if self.rank == 0:
                check_port_free(port)
            else:
                check_reachable(host, port, self.wait_s)


def build(
    config: str,
    overrides: Sequence[str],
    *,
    nproc: int,
    cores: int,
    env: Mapping[str, str],
    python: str = "",
    max_restarts: int = 0,
    nodes: Nodes = Nodes(),
) -> Command:
    """Builds the command; starts nothing.

    Args:
        config: Path of the run's YAML file, handed on untouched.
        overrides: Further arguments of the training command, handed on untouched.
        nproc: Processes on this machine, one a GPU.
        cores: CPU cores of this machine. Left alone, every process would open a thread pool over all of them.
        env: Environment to extend; an OMP_NUM_THREADS in it is kept.
        python: Interpreter; the running one by default.
        max_restarts: How often all workers are started again when one is lost.
        nodes: The machines.

    Raises:
        UserError: ``nproc`` is less than one, or machines that cannot be.
    """
    check_counts(nproc, max_restarts)
    nodes.check()
    launcher = [python or sys.executable, "-m", "torch.distributed.run"]
    # Without a store of its own each round of workers finds the addresses of the round before it in the shared one, and
    # whoever starts first connects to the dead (torch 2.13: "connectFullMesh ... Connection refused").
    more = {**threads(nproc, cores), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if nodes.most == 1:
        launcher.append("--standalone")
    else:
        host, port = split_endpoint(nodes.endpoint)
        address = address_towards(host, port)
        # is_host: torchrun compares the endpoint with its own host name, which containers share. --local-addr: else the
        # workers look for each other under that name. The timeouts are how long agents outlast a cut of the network.
        launcher += [
            f"--nnodes={nodes.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={nodes.endpoint}",
            f"--local-addr={address}",
            f"--rdzv-conf=is_host={int(nodes.rank == 0)},timeout={nodes.survive_s:g},read_timeout={nodes.survive_s:g}",
        ]
        interface = interface_of(address)
        if interface is not None:  # gloo asks the host name, too
            more["GLOO_SOCKET_IFNAME"] = interface
    launcher.append(f"--nproc-per-node={nproc}")
    if max_restarts:
        launcher.append(f"--max-restarts={max_restarts}")
    return Command((*launcher, "-m", MODULE, config, *overrides), {**more, **env})


def check_counts(nproc: int, max_restarts: int) -> None:
    """Refuses numbers that no launcher could serve.

    Raises:
        UserError: As said.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: the number of processes must be 1 or more")
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: must be 0 or more")


def threads(nproc: int, cores: int) -> dict[str, str]:
    """Each process its share of the cores."""
    return {"OMP_NUM_THREADS": str(max(1, cores // nproc))}


def default_nproc() -> int:
    """One process a visible GPU; one where there is none."""
    import torch

    return torch.cuda.device_count() or 1
