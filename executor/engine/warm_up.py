"""What an engine runs before it serves: whatever a library prepares at a first use would hold up everybody later."""

from __future__ import annotations

import logging
import sys
import time

from qllm.executor.engine.step_costs import batch_of, run_first_layers
from qllm.executor.gpu.large_blocks import REGULAR
from qllm.executor.model.runner import Runner

LAYERS = 2  # of a pass: some models begin with a layer of another kind
SWITCH_S = 5e-4  # that a client's thread may compute while the engine wants to go on; Python's 5 ms exceed a step
MOST_SECONDS = 5.0  # after so many the remaining lengths are left to their first use

log = logging.getLogger(__name__)


def warm_up(runner: Runner, most_rows: int) -> None:
    """Run the first layers of prompts of those lengths for which cuDNN prepares a plan of its attention.

    It does so for each thread anew: call this in the thread that serves. Prompts whose attention is cut are left out:
    each length has other plans. Other threads of the process give way sooner from now on.

    Args:
        runner: its cache is made, nothing is served yet; the KV of its first blocks is overwritten.
        most_rows: of a pass in serving.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
    start, room = time.monotonic(), runner.cache.n_blocks * runner.cache.block_size
    most = min(most_rows, room, runner.max_positions or room)
    lengths = sorted([*range(REGULAR, most + 1, REGULAR), REGULAR + 1])  # one leaves a rest to FlashAttention
    for length in (n for n in lengths if n <= most):
        batch = batch_of(runner, [0] * length)
        if runner.splitter(batch).query_blocks > 1:
            continue
        try:
            run_first_layers(runner, batch, LAYERS)
        except RuntimeError as error:  # such as too little memory: no reason not to serve
            log.warning("prompts of %d tokens could not be warmed up: %s", length, type(error).__name__)
            return
        if time.monotonic() - start > MOST_SECONDS:
            log.info("warmed up to prompts of %d tokens: no time for more", length)
            return
