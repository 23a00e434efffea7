"""Weights of experts in fewer bits, expanded one expert at a time when rows meet it.

nf4.py             four bits a weight, as in QLoRA; products of rows with it
experts.py         which experts of a model are kept so, and what its weights then take
"""
