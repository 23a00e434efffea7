"""Tables of what planners ask: capacities, and what a prefix cache is worth."""

from __future__ import annotations

from figure_parts.markdown import markdown
from figure_parts.results import caption, load


def capacity() -> str:
    """Capacity of each policy by search and by a fine sweep, and its cost."""
    found = load("capacity")
    rows = [
        (
            f"`{row['policy']}`",
            f"{row['rate_rps']:.3g}",
            f"{row['rate_lo_rps']:.3g}-{row['rate_hi_rps']:.3g}",
            row["limit"],
            f"{row['by_sweep_rps']:.3g} ({row['difference']:+.1%})",
            f"{row['saturation_rps']:.3g}",
            f"{row['output_tokens_per_s']:.0f}",
            f"{row['cost_per_million_output_tokens']:.3g}",
            f"{row['cost_per_million_tokens']:.3g}",
        )
        for row in found["rows"].to_dict("records")
    ]
    price = f"at {found['provenance']['price_per_gpu_hour']:g} a GPU hour: per million output tokens"
    columns = ("policy", "requests/s", "95 % interval", "fails above it", "by a fine sweep (search over it)")
    columns += ("saturation", "output tokens/s", price, "per million tokens")
    return markdown(columns, rows, caption("capacity"))


def prefix_cache() -> str:
    """Conversations with less and less memory, with a prefix cache and without."""
    rows = [
        (
            f"{row['kv_blocks']:,}",
            f"`{row['policy']}`",
            f"{row['cached_share']:.0%}" if row["prefix_cache"] else "no cache",
            f"{row['chat_ttft_mean_ms']:.0f} / {row['chat_ttft_p99_ms']:.0f}",
            f"{row['chat_tpot_p99_ms']:.1f}",
            f"{row['agent_turnaround_s']:.2f}",
        )
        for row in load("prefix_cache")["rows"].to_dict("records")
    ]
    columns = ("KV blocks", "policy", "prompt tokens found", "chat TTFT mean / p99 ms", "chat TPOT p99 ms")
    return markdown((*columns, "agent turnaround s"), rows, caption("prefix_cache"))
