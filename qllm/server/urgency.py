"""The class of a request: what the client says of it, what its key allows, and what is answered."""

from __future__ import annotations

from typing import Any, NamedTuple

from qllm.executor.checks import MOST_ID
from qllm.scheduler import Fcfs, Policy
from qllm.server.errors import ApiError
from qllm.server.protocol import Generate
from qllm.server.settings import ApiKey, ClassSettings, ServerSettings


class Urgency(NamedTuple):
    """How urgent a request is.

    Attributes:
        class_: its class, whose limits it is counted in.
        priority: for the scheduler; lower is more urgent.
        tier: the service tier that it is served in; None where none stands for its class.
    """

    class_: str
    priority: int
    tier: str | None


def wants(asked: Generate, class_: ClassSettings) -> dict[str, Any]:
    """What policies may go by besides the priority, as arguments of `submit`: the request's, else its class's."""
    return {
        "max_ttft": class_.max_ttft if asked.max_ttft is None else asked.max_ttft,
        "max_tpot": class_.max_tpot if asked.max_tpot is None else asked.max_tpot,
        "tenant": (asked.user or "")[:MOST_ID],
    }


class Urgencies:
    """The rules of one server. A client that says two different things, or asks for what it may not have, hears so."""

    def __init__(self, settings: ServerSettings, policy: Policy):
        self._settings = settings
        self._ordered = not isinstance(policy, Fcfs)  # otherwise no priority is honoured

    def resolve(
        self,
        *,
        priority: int | None,
        tier: str | None,
        suffix: str | None = None,
        header: str | None = None,
        class_name: str | None = None,
        key: ApiKey | None = None,
    ) -> Urgency:
        """The urgency of a request that says this; `class_name`: in its body. Raises ApiError."""
        settings = self._settings
        if tier is not None and tier not in settings.tiers:
            raise ApiError(
                400,
                f"service_tier: {tier!r:.40} is no tier of this server; allowed: {', '.join(settings.tiers)}",
                param="service_tier",
                code="unknown_tier",
            )
        named: dict[str, str] = {}
        if tier is not None and tier != "auto":
            named["service_tier"] = settings.tiers[tier]
        if suffix is not None:
            named["model"] = settings.model_suffixes[suffix]
        for where, name in ((settings.class_header, header), ("class", class_name)):
            if name is not None:
                if name not in settings.classes:
                    raise ApiError(
                        400,
                        f"{where}: no class is called {name!r:.40}; allowed: {', '.join(settings.classes)}",
                        param=where,
                        code="unknown_class",
                    )
                named[where] = name
        if priority is not None:
            named["priority"] = self._class_of(priority)
        if len(set(named.values())) > 1:
            told = ", ".join(f"{by} says {class_}" for by, class_ in named.items())
            raise ApiError(400, f"the request names two classes: {told}", param=next(iter(named)), code="two_classes")
        fallback = settings.default_class if key is None or key.class_name is None else key.class_name
        if tier == "auto" and (key is None or key.class_name is None):
            fallback = settings.tiers["auto"]
        class_ = next(iter(named.values()), fallback)
        by = next(iter(named), None)
        level = settings.classes[class_].priority if priority is None else priority
        if key is not None and key.class_name is not None and level < settings.classes[key.class_name].priority:
            raise ApiError(
                403,
                f"{by}: this API key may use class {key.class_name}, and nothing more urgent",
                kind="permission_error",
                param=by,
                code="class_not_allowed",
            )
        usual = settings.classes[settings.default_class].priority
        if not self._ordered and level != usual:
            raise ApiError(
                400,
                f"{by or 'class'}: policy fcfs serves by arrival and honours no priority",
                param=by,
                code="priority_not_honoured",
            )
        return Urgency(class_, level, self._tier_of(class_, tier))

    def _class_of(self, priority: int) -> str:
        """The class whose priority is nearest, from the more urgent side; the most urgent one for what is above all."""
        classes = sorted(self._settings.classes.items(), key=lambda pair: pair[1].priority)
        fitting = [name for name, one in classes if one.priority <= priority]
        return fitting[-1] if fitting else classes[0][0]

    def _tier_of(self, class_: str, asked: str | None) -> str | None:
        tiers = self._settings.tiers
        if asked is not None and asked != "auto" and tiers[asked] == class_:
            return asked
        named = [tier for tier, one in tiers.items() if one == class_ and tier != "auto"]
        return "default" if "default" in named else next(iter(named), None)
