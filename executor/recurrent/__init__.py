"""Layers that keep a state of each sequence beside the KV cache: linear attention, state spaces, convolutions."""
