"""Defaults of imported and modelled timing traces, light for `qllm --help`."""

SOURCE = "aiconfigurator-core"  # the installed package
GPU = "a100_sxm"
KERNELS = "sglang"  # whose MoE, GEMM and attention kernels
KERNEL_DTYPE = "bfloat16"  # as the tables spell it
LAUNCH_S = 5e-6  # seconds per kernel launch
HOST_S = 1e-3  # seconds of host time per pass

# Of traces modelled from a data sheet (step_times/modelled.py, which says where they come from).
MEMORY_EFFICIENCY = 0.8  # of the bandwidth
GEMM_EFFICIENCY = 0.75  # of the peak
EXPERT_EFFICIENCY = 0.475  # of the peak, in a fused MoE kernel
ATTENTION_EFFICIENCY = 0.5  # of the 16-bit peak, attention of prompts
KERNEL_S = 3e-6  # that a kernel takes beside its work
ATTENTION_S = 12e-6  # the same of an attention kernel
EXPERTS_BASE_S = 38e-6  # the same of the fused MoE kernels of a layer
