"""What the engine does and did, for /metrics and the page: asked in the engine's thread, told as numbers and JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Lock
from typing import Any

from qllm.executor import Engine
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.recorder import Activity, ActivityRecorder, Standing
from qllm.server.metrics import Metrics
from qllm.server.settings import ServerSettings

SHOWN_S = 30.0  #: seconds of passes that the page is told
TTFTS_S = 300.0  #: seconds of first tokens that the page is told
FRESH_S = 0.2  #: for so many seconds an answer of the engine serves everybody who asks


@dataclass(frozen=True)
class Look:
    """The engine at one moment, and what it did in the last seconds."""

    activity: Activity
    free_blocks: int
    total_blocks: int
    time: float  #: of the moment, in seconds of the epoch


class Monitor:
    """Looks at an engine. Any thread may ask; who asks waits for the engine's next preemption point.

    Args:
        engine: keeps its last passes from now on.
        settings: of the server.
        name: of the model.

    Attributes:
        metrics: of the engine and its requests.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, name: str):
        self._engine = engine
        self._name = name
        self._policy = type(engine.scheduler.policy).__name__
        self._layers = int(engine.model.config.get_text_config().num_hidden_layers)
        #: (priority, name), the most urgent first
        self._classes = sorted((one.priority, name) for name, one in settings.classes.items())
        self._lock = Lock()
        self._look: Look | None = None
        engine.call(self._begin)
        self.metrics = Metrics([name for _, name in self._classes], lambda: self.look(0.0).activity)

    def _begin(self, loop: Loop) -> None:
        loop.activity = ActivityRecorder(loop.scheduler, self.class_of)

    def class_of(self, priority: int) -> str:
        """The class of a priority: the least urgent one that is not more urgent than asked for, else the first."""
        names = [name for least, name in self._classes if least <= priority]
        return names[-1] if names else self._classes[0][1]

    def look(self, seconds: float = SHOWN_S) -> Look:
        """The engine now, with its passes of the last `seconds`. Raises EngineClosed."""

        def ask(loop: Loop) -> Look:
            now = loop.clock.now()
            recorder = loop.activity or ActivityRecorder(loop.scheduler, self.class_of)
            kv = loop.scheduler.kv
            return Look(recorder.activity(now, now - seconds), kv.free, kv.total, time.time())

        return self._engine.call(ask)

    def status(self, after: float = 0.0) -> dict[str, Any]:
        """What the page shows; of passes and first tokens those that ended after `after`, seconds of the epoch."""
        with self._lock:  # the engine is asked once, however many pages are open
            if self._look is None or time.time() - self._look.time > FRESH_S:
                self._look = self.look()
            look = self._look
        return self._told(look, after)

    def _told(self, look: Look, after: float) -> dict[str, Any]:
        activity = look.activity
        epoch = look.time - activity.now  # of the engine's clock
        newest = max(after, look.time - TTFTS_S)
        return {
            "model": self._name,
            "policy": self._policy,
            "time": look.time,
            "layers": self._layers,
            "kv": {"free": look.free_blocks, "total": look.total_blocks},
            "classes": [
                {"name": name, "priority": priority, **activity.classes.get(name, Standing())._asdict()}
                for priority, name in self._classes
            ],
            "passes": [
                {
                    "id": place.pass_id,
                    "class": place.class_,
                    "prefills": place.prefills,
                    "decodes": place.decodes,
                    "tokens": place.tokens,
                    "layer": place.layer,
                    "stage": place.stage,
                    "suspended": place.suspended,
                    "seconds": activity.now - place.since,
                }
                for place in activity.passes
            ],
            "slices": [
                {
                    "id": one.pass_id,
                    "class": self.class_of(one.priority),
                    "start": one.start + epoch,
                    "end": one.end + epoch,
                    "from": one.first_layer,
                    "to": one.layer,
                    "stage": one.stage,
                    "suspended": one.suspended,
                }
                for one in activity.slices
                if one.end + epoch > after
            ],
            "ttfts": [
                {"time": at, "class": name, "seconds": took}
                for at, name, took in list(self.metrics.ttfts)
                if newest < at <= look.time
            ],
        }
