"""The tables of kinds of models: with recurrent layers, with experts in four bits."""

from __future__ import annotations

from figure_parts.markdown import markdown
from figure_parts.results import caption, load


def recurrent() -> str:
    """A hybrid model on this engine and by transformers' `generate`."""
    rows = [
        (
            row["engine"],
            f"{row['tokens_per_s']:.0f}",
            "-"
            if row["engine"] == "qllm"
            else f"{row['ratio']:.1f} ({row['ratio_lowest']:.1f} - {row['ratio_highest']:.1f})",
            f"{row['same_tokens']} of 16",
        )
        for row in load("recurrent")["rows"].to_dict("records")
    ]
    return markdown(("engine", "tokens/s", "qllm / it, run by run", "same tokens"), rows, caption("recurrent"))


def nf4() -> str:
    """Experts in NF4 against plain ones."""
    found = load("nf4")
    checks = found["checks"].iloc[0]
    rows = [
        (
            row["experts"],
            f"{row['expert_bytes'] / 1e6:.0f} MB",
            f"{row['prefill_tokens_per_s']:.0f} ({row['prefill_to_bfloat16']:.2f})",
            f"{row['decode_tokens_per_s']:.0f} ({row['decode_to_bfloat16']:.2f})",
        )
        for row in found["rows"].to_dict("records")
    ]
    off = f"logits: {checks['logits_error']:.1e} off those of the same weights expanded"
    told = f"Experts: {checks['memory']:.3f} of bfloat16's bytes; {off}."
    columns = ("experts", "their bytes", "prefill tokens/s (to bfloat16)", "decode tokens/s (to bfloat16)")
    return markdown(columns, rows, f"{told} {caption('nf4')}")
