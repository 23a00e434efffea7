"""The process of a server: a model to serve (load.py, demo.py), a socket, signals and an end in order (serve.py)."""
