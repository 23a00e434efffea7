"""Validation: the same requests on the real engine and in the simulator."""
