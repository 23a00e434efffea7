"""Reading checkpoints: files are looked at first, so that what is wrong with them is told before weights are read.

files.py           what headers tell, and which weights would be misread
reading.py         the weights, with transformers
"""
