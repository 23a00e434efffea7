"""Latent attention (MLA): what is kept of a token is the latent of its keys and values, not those of every head."""
