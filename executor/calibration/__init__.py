"""Calibration: passes of the engine, timed part by part, become a timing trace."""
