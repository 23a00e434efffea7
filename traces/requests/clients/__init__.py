"""Requests of many clients, as ServeGen describes them (arXiv 2505.09999): each client is a process of its own."""
