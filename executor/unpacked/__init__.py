"""Attention that is not packed: the model's own, called for one sequence at a time over its paged tokens."""
