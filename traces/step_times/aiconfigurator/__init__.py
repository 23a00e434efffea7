"""Timing traces from the kernel measurements that NVIDIA publishes with aiconfigurator."""
