"""A policy of one's own: the shortest prompt first, and an urgent one stops a patient pass inside its layer.

python examples/my_policy.py
"""

from pathlib import Path

from qllm import simulate
from qllm.scheduler import Policy

CONFIG = Path(__file__).parents[1] / "configs" / "long_prefill.yaml"


class ShortestFirst(Policy):
    granularity = "expert"  # where a running pass may stop

    def order(self, r):
        return (r.prompt_tokens, r.arrival, r.id)

    def preempts(self, s, running, now):
        return s.waiting.level() < running.level and s.can_prefill(s.waiting.level())


def main() -> None:
    mine = f"{{file: {Path(__file__).resolve()}, label: mine}}"
    changes = [f"policies=[priority, {mine}]", "sweep.rate=[0.4]", "requests=100", "seeds=1"]
    results = simulate(CONFIG, set=changes)
    print(results.summary[["policy", "class", "ttft_p99_s", "turnaround_mean_s", "preemptions"]].to_string(index=False))


if __name__ == "__main__":
    main()
