"""Serve a small random model: an urgent request overtakes a long patient one, its tokens printed as they come.

python examples/serve.py
"""

import time

from qllm.executor import Engine
from qllm.executor.testing import demo_model


def main() -> None:
    model = demo_model()  # a path or a name on the Hugging Face Hub: Engine.from_pretrained(...)
    with Engine(model, policy="slack") as engine:
        patient = engine.submit([5] * 600, max_new_tokens=8, priority=1)  # best-effort
        time.sleep(0.1)  # its pass runs now
        urgent = engine.submit([7, 8, 9], max_new_tokens=8, priority=0)  # latency-sensitive
        for token in urgent:
            print(f"urgent: token {token.id}")
        print(f"patient: {len(patient.result().tokens)} tokens, preempted {patient.times.preemptions} times")
        print(f"first token after {urgent.times.first_token - urgent.times.arrival:.3f} s (urgent), ", end="")
        print(f"{patient.times.first_token - patient.times.arrival:.3f} s (patient)")


if __name__ == "__main__":
    main()
