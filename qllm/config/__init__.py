"""Configurations: YAML with its line numbers, the models that check it, and what is made from it."""
