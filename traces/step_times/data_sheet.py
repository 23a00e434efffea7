"""What data sheets say of GPUs: memory, its bandwidth, operations a second."""

from __future__ import annotations

import re
from typing import NamedTuple

from qllm.traces.messages import clipped, suggestion
from qllm.traces.step_times.file_format import TimingError

GIB = 1 << 30


class Gpu(NamedTuple):
    """One GPU by its data sheet. Operations are those of the tensor cores, dense, accumulated in 32 bits.

    0 for eight or four bits: it computes them as 16-bit numbers. 0 bytes of memory: not stated.
    """

    bandwidth: float  # bytes a second of its memory
    flops: float  # operations a second, 16-bit numbers
    fp8_flops: float = 0.0
    fp4_flops: float = 0.0
    memory: int = 0  # bytes
    host_bandwidth: float = 0.0  # bytes a second to or from the host, one direction
    device: str = ""

    def peak(self, bits: int) -> float:
        """Operations a second of numbers of so many bits, or of the next wider that it computes with."""
        return (self.fp4_flops if bits <= 4 else 0.0) or (self.fp8_flops if bits <= 8 else 0.0) or self.flops


# NVIDIA's data sheets: V100 (2018), T4, A100 (2021), A10, A30, L4, L40S, H100 (2023), H200, B200 and GB200 (DGX), RTX
# (Ada and Blackwell architecture papers); AMD's data sheets: MI250X, MI300X, MI325X. Keys are parts of a device's name;
# of several with one name (memory of 40 or 80 GB, PCIe or SXM) the fastest.
GPUS = {
    "V100": Gpu(0.9e12, 125e12),
    "T4": Gpu(0.32e12, 65e12),
    "A10": Gpu(0.6e12, 125e12),
    "A30": Gpu(0.933e12, 165e12),
    "A100": Gpu(2.039e12, 312e12),
    "L4": Gpu(0.3e12, 121e12),
    "L40": Gpu(0.864e12, 362e12),
    "H100": Gpu(3.35e12, 989e12),
    "H100 NVL": Gpu(3.9e12, 989e12),
    "GH200": Gpu(4.9e12, 989e12),
    "H200": Gpu(4.8e12, 989e12),
    **dict.fromkeys(("B200", "GB200", "B300", "GB300"), Gpu(8e12, 2.5e15)),
    "RTX 4090": Gpu(1.01e12, 330e12),
    "RTX 5090": Gpu(1.79e12, 420e12),
    "RTX 6000 Ada": Gpu(0.96e12, 364e12),
    "RTX PRO 6000": Gpu(1.792e12, 500e12),
    "MI250": Gpu(3.28e12, 383e12),
    "MI300X": Gpu(5.3e12, 1307e12),
    "MI325X": Gpu(6e12, 1307e12),
}

# By name, as aiconfigurator spells those that it has tables of; for these its systems/NAME.yaml is the source (0.12.0),
# for the others the makers' data sheets.
DATA_SHEETS = {
    "a100_sxm": Gpu(2.039e12, 312e12, 0, 0, 80 * GIB, 32e9, "NVIDIA A100-SXM4-80GB"),
    "a100_pcie": Gpu(1.935e12, 312e12, 0, 0, 80 * GIB, 32e9, "NVIDIA A100-PCIE-80GB"),
    "a30": Gpu(0.933e12, 165e12, 0, 0, 24 * GIB, 32e9, "NVIDIA A30"),
    "a10": Gpu(0.6e12, 125e12, 0, 0, 24 * GIB, 32e9, "NVIDIA A10"),
    "l4": Gpu(0.3e12, 121e12, 242e12, 0, 24 * GIB, 32e9, "NVIDIA L4"),
    "l40s": Gpu(0.864e12, 362.05e12, 733e12, 0, 48305799168, 32e9, "NVIDIA L40S"),
    "h100_sxm": Gpu(3.35e12, 989e12, 1978e12, 0, 80 * GIB, 64e9, "NVIDIA H100 80GB HBM3"),
    "h100_pcie": Gpu(2e12, 756.5e12, 1513e12, 0, 80 * GIB, 64e9, "NVIDIA H100 PCIe"),
    "h200_sxm": Gpu(4.8e12, 989e12, 1978e12, 0, 141 * GIB, 64e9, "NVIDIA H200"),
    "b200_sxm": Gpu(7.7e12, 2.25e15, 4.5e15, 9e15, 180 * GIB, 128e9, "NVIDIA B200"),
    "b300_sxm": Gpu(7.75e12, 2.25e15, 4.5e15, 14e15, 288400343040, 128e9, "NVIDIA B300"),
    "gb200": Gpu(8e12, 2.5e15, 5e15, 10e15, 198674743296, 64e9, "NVIDIA GB200"),
    "gb300": Gpu(8e12, 2.5e15, 5e15, 15e15, 298013687808, 64e9, "NVIDIA GB300"),
    "rtx_pro_6000_server": Gpu(
        1.792e12, 467.8e12, 935.6e12, 1871.2e12, 102641958912, 64e9, "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    ),
    "rtx_4090": Gpu(1.008e12, 165.2e12, 330.3e12, 0, 24 * GIB, 32e9, "NVIDIA GeForce RTX 4090"),
    "rtx_5090": Gpu(1.792e12, 209.5e12, 419e12, 1676e12, 32 * GIB, 64e9, "NVIDIA GeForce RTX 5090"),
    "mi300x": Gpu(5.3e12, 1307e12, 2614e12, 0, 192 * GIB, 64e9, "AMD Instinct MI300X"),
    "mi325x": Gpu(6e12, 1307e12, 2614e12, 0, 256 * 10**9, 64e9, "AMD Instinct MI325X"),
}


def gpu_named(device: str) -> Gpu | None:
    """The GPU of that name ("NVIDIA A100-SXM4-80GB"), by the longest key of GPUS in it."""
    found = [key for key in GPUS if re.search(rf"(?<![A-Z0-9]){key}(?![0-9])", device, re.IGNORECASE)]
    return GPUS[max(found, key=len)] if found else None


def data_sheet_name(gpu: str) -> str:
    """The key of DATA_SHEETS that is meant: "H200", "h200" and "h200-sxm" are h200_sxm. TimingError lists all."""
    name = gpu.strip().lower().replace("-", "_").replace(" ", "_")
    for candidate in (name, f"{name}_sxm"):
        if candidate in DATA_SHEETS:
            return candidate
    raise TimingError(f"unknown GPU {clipped(gpu)!r}; {suggestion(name, DATA_SHEETS)}")


def short_name(gpu: str) -> str:
    """How files are called after a key of DATA_SHEETS: without _sxm."""
    return gpu.removesuffix("_sxm")
