"""Request traces: read, written, generated."""
