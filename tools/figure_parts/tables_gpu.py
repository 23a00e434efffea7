"""The tables of what was measured on a GPU."""

from __future__ import annotations

from figure_parts.markdown import markdown
from figure_parts.results import caption, load


def gpu() -> str:
    """Every figure of `benchmarks/gpu.py`, with its goal."""
    rows = [
        (row["what"], f"{row['value']:.4g} {row['unit']}".strip(), row["goal"], row["verdict"], row["note"])
        for row in load("gpu")["figures"].to_dict("records")
        if row["value"] == row["value"]  # what there was no time for is not a number
    ]
    return markdown(("what", "value", "goal", "", "note"), rows, caption("gpu"))


def latents() -> str:
    """Latent attention with latents kept, and with keys and values of all heads."""
    rows = [
        (
            row["keeps"],
            f"{row['kv_bytes_per_token'] / 1e3:.1f} kB",
            f"{row['sequences']} x {row['context']:,}",
            f"{row['kv_mb'] / 1e3:.1f} GB",
            f"{row['decode_ms']:.1f} ms",
            f"{row['chunk_ms']:.1f} ms",
        )
        for row in load("latents")["latents"].to_dict("records")
    ]
    columns = (
        "keeps",
        "KV a token, 8 layers",
        "sequences x context",
        "KV of all",
        "decode pass",
        "last 512 of a prompt",
    )
    return markdown(columns, rows, caption("latents"))
