"""Experiments: a configuration's runs, simulated or on the engine, and their results."""
