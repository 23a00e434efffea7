"""The executor: Hugging Face MoE models in PyTorch, every forward pass suspendable between two experts.

model      load a model with the hooks, or refuse it          passes    one pass in a greenlet: advance, suspend, close
support    what is refused, and why                           cuts      where a pass can stop
hooks      registration with transformers                     batch     packed rows and their attention plan
attention  attention hook                                     kv_cache  paged KV, moved to host memory and back
experts    experts hook                                       sampling  logits to tokens
linear     packed weights on CPUs                             families  the MoE families of transformers, tiny models
runner     starts passes over one model and one KV cache

engine     serves requests: submit, cancel, close             loop      the thread that decides and runs passes
streams    tokens as they come, and the record of times       jobs      a request inside the engine
clock      real time, or that of a step model                 replays   a request trace, sent and recorded
memory     which KV blocks are whose                          tape      the timeline and routing of a run
asides     what the engine's thread does beside serving

calibrate  a timing trace from measured passes                measure   one pass, timed part by part
bench      the passes of a calibration, in rounds             grids     which passes
measured   finished measurements, kept on disk                timing_points  from them to the trace's points
subject    the model that is calibrated                       facts     device, sizes, versions, clocks
loop_cost  the engine's own time between passes               routing_record  experts that real prompts use
calibration_check  whole passes against the sum of their steps

from qllm.executor import Engine

with Engine.from_pretrained("Qwen/Qwen3-30B-A3B", policy="qllm", device="cuda", dtype="bfloat16") as engine:
    for token in engine.submit("Hello", max_new_tokens=32, priority=0):
        print(token.text, end="")
"""

if __name__ != "qllm.executor":
    raise ImportError("this package is called qllm.executor: from qllm.executor import ...")

from typing import TYPE_CHECKING

from qllm._lazy import lazy

if TYPE_CHECKING:
    from qllm.executor.engine.clock import RealClock as RealClock
    from qllm.executor.engine.clock import VirtualClock as VirtualClock
    from qllm.executor.engine.engine import Engine as Engine
    from qllm.executor.engine.replay import replay as replay
    from qllm.executor.errors import ExecutorError as ExecutorError

# Loaded when first used: torch and transformers take seconds to import.
_WHERE = {
    "Engine": "qllm.executor.engine.engine",
    "ExecutorError": "qllm.executor.errors",
    "RealClock": "qllm.executor.engine.clock",
    "VirtualClock": "qllm.executor.engine.clock",
    "replay": "qllm.executor.engine.replay",
}

__all__ = [*_WHERE]
__getattr__, __dir__ = lazy(__name__, _WHERE)
