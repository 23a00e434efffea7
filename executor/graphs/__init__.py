"""Passes replayed as graphs, piece by piece from one preemption point to the next."""
