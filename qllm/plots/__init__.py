"""Figures, timelines and the report."""
