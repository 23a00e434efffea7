"""How the next token is chosen from logits: parameters of a request, on a CPU and on a device."""
