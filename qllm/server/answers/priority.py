"""Another priority for a request under way, wherever it stands."""

from __future__ import annotations

import logging
from typing import Any

from qllm.executor import EngineClosed
from qllm.executor.engine.loop import Loop
from qllm.server.errors import ApiError, from_engine
from qllm.server.protocol import PriorityRequest
from qllm.server.service import Caller, Service

log = logging.getLogger(__name__)


async def change_priority(service: Service, id: str, asked: PriorityRequest, caller: Caller) -> dict[str, Any]:
    """Give the requests with that id another priority, and their class with it: all their answers, or none.

    Returns:
        What holds from the engine's next decision on.

    Raises:
        ApiError: nothing of that id is under way for this client, or the priority cannot be honoured.
    """
    if asked.priority is None and asked.class_name is None:
        raise ApiError(400, "give a priority or a class", param="priority")
    urgency = service.urgencies.resolve(
        priority=asked.priority,
        tier=None,
        header=caller.class_header,
        class_name=asked.class_name,
        key=caller.key,
    )
    found = service.under_way(id, caller.key)
    choices = [choice for generation in found for choice in generation.choices if not choice.stream.ended]
    if not choices:
        raise ApiError(404, f"id: no request {id!r:.80} is under way", param="id", code="request_not_found")
    tickets = [choice.ticket for choice in choices]
    service.admission.check_move(tickets, urgency.class_)
    for choice in choices:
        service.engine.reprioritize(choice.stream, urgency.priority)

    def honoured(loop: Loop) -> bool:
        """Whether all have it: the engine takes none with which a request could never fit."""
        here = [loop.sequences.get(choice.stream.id) for choice in choices]
        return all(one is None or one.request.priority == urgency.priority for one in here)

    try:
        taken = await service.in_background(lambda: service.engine.call(honoured))
    except EngineClosed as error:
        raise from_engine(error) from error
    if not taken:
        for generation in found:
            for choice in generation.choices:
                service.engine.reprioritize(choice.stream, generation.urgency.priority)
        told = "priority: with it the request could never fit the KV blocks that it may use"
        raise ApiError(400, told, param="priority", code="impossible_request")
    service.admission.move(tickets, urgency.class_)
    for generation in found:
        generation.urgency = urgency
    log.info("%s: priority %d, class %s from now on", id[:80], urgency.priority, urgency.class_)
    return {
        "id": id,
        "object": "request.priority",
        "priority": urgency.priority,
        "class": urgency.class_,
        "service_tier": urgency.tier,
    }
