"""Capacity: the highest rate at which every class meets its SLO, and what it costs."""
