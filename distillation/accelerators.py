"""Devices a run can be planned for, by their makers' figures.

Sources: NVIDIA's data sheets of A100 (June 2021), H100 (2022), H200 (2024) and DGX B200 (2024):
dense bf16 without sparsity, memory and its bandwidth, NVLink in one direction. Network and drives
are those of the makers' own systems (DGX A100 80GB, H100, H200, B200): one adapter of 200 or 400
Gbit/s and 3.84 TB of NVMe per GPU. A drive's 3 GB/s is an assumption, below what PCIe 4 allows.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device. Rates are peaks, per second and device.

    Args:
        name: What it is called.
        memory_bytes: Its memory.
        flops: Dense operations in bf16, two per multiply-add.
        memory_rate: Bytes to and from its memory.
        link_rate: Bytes to other devices of its node, in one direction.
        network_rate: Bytes to other nodes, in one direction.
        per_node: Devices of a node.
        disk_bytes: Its share of the node's drives.
        disk_rate: Bytes from that share.
    """

    name: str
    memory_bytes: float
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    per_node: int = 8
    disk_bytes: float = 3.84e12
    disk_rate: float = 3e9


_H100 = Accelerator(
    name="h100",
    memory_bytes=80e9,
    flops=989e12,
    memory_rate=3.35e12,
    link_rate=450e9,
    network_rate=50e9,
)
ACCELERATORS = {
    "a100": Accelerator(
        name="a100",
        memory_bytes=80e9,
        flops=312e12,
        memory_rate=2.04e12,
        link_rate=300e9,
        network_rate=25e9,
    ),
    "h100": _H100,
    "h200": replace(_H100, name="h200", memory_bytes=141e9, memory_rate=4.8e12),
    "b200": replace(
        _H100,
        name="b200",
        memory_bytes=180e9,
        flops=2250e12,
        memory_rate=8e12,
        link_rate=900e9,
    ),
}


@dataclass(frozen=True)
class Cluster:
    """So many devices of a kind, and what of their peaks they reach.

    Args:
        kind: The device.
        count: How many.
        efficiency: Share of the peak operations reached in forward and backward passes, in (0, 1].
            Llama 3 405B was trained at 0.38 to 0.43 on H100 (Grattafiori et al. 2024,
            arXiv:2407.21783, table 4).
        link_share: Share of a link's peak that a sum over devices reaches, in (0, 1].
        gather_share: The same of gathering a block that is spread; None is ``link_share``.
    """

    kind: Accelerator
    count: int
    efficiency: float = 0.4
    link_share: float = 0.7
    gather_share: float | None = None

    @property
    def flops(self) -> float:
        """Operations per second of one device, as reached."""
        return self.kind.flops * self.efficiency

    @property
    def link(self) -> float:
        """Bytes per second between two devices as reached in a sum."""
        return self._peak_link * self.link_share

    @property
    def gathering(self) -> float:
        """Bytes per second that a device receives of a block that is gathered."""
        share = self.link_share if self.gather_share is None else self.gather_share
        return self._peak_link * share

    @property
    def _peak_link(self) -> float:
        """The slowest link rules a ring."""
        crosses_nodes = self.count > self.kind.per_node
        return self.kind.network_rate if crosses_nodes else self.kind.link_rate

    def reduced(self, message: float) -> float:
        """Bytes each device sends to sum up a message over all of them, in a ring.

        ``2 (D - 1) / D`` times the message (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
        """
        return 2 * (self.count - 1) / self.count * message

    def gathered(self, message: float) -> float:
        """Bytes each device receives of a message that all of them hold a part of."""
        return (self.count - 1) / self.count * message
