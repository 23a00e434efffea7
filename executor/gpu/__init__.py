"""What runs on a GPU: Triton kernels, and the choice between them and PyTorch's.

Nothing here knows passes or models. `qllm.executor.model` calls it where tensors are on a GPU, and in tests on a CPU,
where Triton interprets the kernels (TRITON_INTERPRET=1).
"""
