"""Weights of experts in fewer bits, expanded one expert at a time when rows meet it.

weights.py         what all of them have in common: products of rows with them
nf4.py             four bits a weight, as in QLoRA, made of plain weights
blocks.py          FP8 and MXFP4, as checkpoints hold them
layout.py          which weights of a checkpoint are read here: experts that stay packed, what transformers misreads
packed.py          reading them
left_out.py        having transformers load the rest of the checkpoint
experts.py         which experts of a model are kept so, and what its weights then take
testing.py         checkpoints in FP8 and MXFP4, made of plain ones
"""
