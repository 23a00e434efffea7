"""Defaults of an aiconfigurator import, light for `qllm --help`; shipped traces: see tools/derive_timings.py."""

SOURCE = "aiconfigurator-core"  # the installed package
GPU = "a100_sxm"
KERNELS = "sglang"  # whose MoE, GEMM and attention kernels
KERNEL_DTYPE = "bfloat16"  # as the tables spell it
LAUNCH_S = 5e-6  # seconds per kernel launch
HOST_S = 1e-3  # seconds of host time per pass
