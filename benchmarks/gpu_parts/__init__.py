"""The parts of `benchmarks/gpu.py`: passes, serving, checks. A part is a function of a `World`, found by its name."""
