"""What `tools/figures.py` draws from: results, tables and pictures."""
