"""The least time that bytes and arithmetic take on a GPU: its data sheet's rates, and a measured copy bandwidth."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Peaks", "Work", "floor", "peaks_of"]


class Peaks(NamedTuple):
    """Rates a second, dense. half: products and sums of 16-bit tensor cores; single: of float32 outside of them."""

    half: float
    tf32: float
    single: float
    bytes: float


# By a part of torch's name of the device, more special ones first. NVIDIA's data sheets, without sparsity.
_TABLE = {
    "H200": Peaks(989.4e12, 494.7e12, 66.9e12, 4.8e12),
    "H100 PCIe": Peaks(756e12, 378e12, 51.2e12, 2.0e12),
    "H100 NVL": Peaks(835.5e12, 417.5e12, 60e12, 3.9e12),
    "H100": Peaks(989.4e12, 494.7e12, 66.9e12, 3.35e12),
    "A100-SXM4-40GB": Peaks(312e12, 156e12, 19.5e12, 1.555e12),
    "A100-PCIE-40GB": Peaks(312e12, 156e12, 19.5e12, 1.555e12),
    "A100 80GB PCIe": Peaks(312e12, 156e12, 19.5e12, 1.935e12),
    "A100": Peaks(312e12, 156e12, 19.5e12, 2.039e12),
    "L40S": Peaks(362e12, 183e12, 91.6e12, 0.864e12),
    "RTX 4090": Peaks(165.2e12, 82.6e12, 82.6e12, 1.008e12),
}


def peaks_of(name: str) -> Peaks | None:
    """The peaks of a device by torch's name of it; None if it is not in the table."""
    return next((peaks for part, peaks in _TABLE.items() if part.lower() in name.lower()), None)


class Work(NamedTuple):
    """What a kernel cannot do without. products: FLOP of tensor cores, in `kind` ("half" or "tf32")."""

    bytes: float
    products: float = 0.0
    kind: str = "half"
    additions: float = 0.0


def floor(work: Work, peaks: Peaks | None, copy_bandwidth: float) -> tuple[float, str]:
    """(seconds, what sets them), if memory, tensor cores and float32 units were all kept busy all the time.

    Bytes are taken at the bandwidth that a copy reached on this very device. For a device that the table does not have,
    bytes alone count.
    """
    times = {"bytes": work.bytes / copy_bandwidth}
    if peaks is not None:
        times["tensor cores"] = work.products / getattr(peaks, work.kind)
        times["float32 units"] = work.additions / peaks.single
    limit = max(times, key=times.__getitem__)
    return times[limit], limit
