"""Simulate three policies at two request rates, and print what latency-sensitive requests get.

python examples/simulate.py
"""

from pathlib import Path

from qllm import simulate

CONFIG = Path(__file__).parents[1] / "configs" / "long_prefill.yaml"


def main() -> None:
    changes = ["policies=[priority, chunked, hybrid]", "sweep.rate=[0.2,0.4]", "requests=100", "seeds=1"]
    results = simulate(CONFIG, set=changes)
    ls = results.summary[results.summary["class"] == "ls"]
    print(results.config.provenance["timings"])  # who says how long a step takes
    print(ls[["policy", "rate", "ttft_mean_s", "ttft_p99_s", "slo_attainment"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
