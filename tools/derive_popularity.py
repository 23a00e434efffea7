"""Re-create the expert popularity tables in traces/data/popularity: python tools/derive_popularity.py [COUNTS]

COUNTS is the OLMoE repository's routing counts (default ../shared/data/routing/olmoe_mixtral_expert_counts.csv):
tokens per expert in three layers of Mixtral-8x7B and OLMoE-1B-7B on several text domains. Each domain counts alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "traces" / "data" / "popularity"
MODELS = {"mixtral-8x7b": "Mixtral-8x7B-v0.1", "olmoe-1b-7b": "olmoe"}
HEADER = """# model: {model}
# source: measured
# domains: {domains}
# licence: Apache-2.0 (OLMoE repository, github.com/allenai/OLMoE, Allen Institute for AI)
# provenance: tokens per expert and layer from that repository's routing analysis, about 205k tokens a domain; shares
#   averaged over the domains by tools/derive_popularity.py
"""


def derive(counts: pd.DataFrame, name: str) -> str:
    """The text of one table: mean over domains of each expert's share of its layer's assignments."""
    rows = counts[counts["model"] == MODELS[name]]
    totals = rows.groupby(["domain", "layer"])["count"].transform("sum")
    shares = (rows["count"] / totals).groupby([rows["layer"], rows["expert"]]).mean()
    domains = ", ".join(sorted(rows["domain"].unique()))
    table = "".join(f"{layer},{expert},{share:.6f}\n" for (layer, expert), share in shares.items())
    return HEADER.format(model=name, domains=domains) + "layer,expert,share\n" + table


if __name__ == "__main__":
    default = ROOT.parent / "shared" / "data" / "routing" / "olmoe_mixtral_expert_counts.csv"
    source = pd.read_csv(sys.argv[1] if len(sys.argv) > 1 else default)
    for name in MODELS:
        (OUT / f"{name}.csv").write_text(derive(source, name), encoding="utf-8")
        print(f"{name}: written")
