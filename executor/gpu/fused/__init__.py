"""One launch each for what PyTorch makes of several small ones: RMS norms, rotary positions, the gate of experts."""
