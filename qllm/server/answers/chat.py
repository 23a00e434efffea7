"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qllm.server.answers.answer import Answer
from qllm.server.answers.logprobs import of_chat
from qllm.server.body import parse
from qllm.server.errors import ApiError
from qllm.server.protocol import ChatMessage, ChatRequest
from qllm.server.service import Caller, Service
from qllm.server.streaming import Piece


class ChatAnswer(Answer):
    """Chat completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return self._with("message", {"role": "assistant", "content": piece.text, "refusal": None}, piece)

    def part(self, piece: Piece, before: int | None) -> dict[str, Any]:
        role = {"role": "assistant"} if before is None else {}
        return self._with("delta", {**role, "content": piece.text}, piece)

    def _with(self, name: str, message: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = None if self.asked.top is None else of_chat(piece.tokens, self.texts)
        found = {"index": piece.index, name: message, "logprobs": logprobs, "finish_reason": piece.finish}
        return found | ({"token_ids": [t.id for t in piece.tokens]} if self.asked.return_token_ids else {})


async def chat(service: Service, data: dict[str, Any], caller: Caller) -> ChatAnswer:
    """Start to answer a request. Raises ApiError."""
    service.check_parts(data.get("messages"))
    asked = parse(ChatRequest, data)
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise ApiError(
            400, "max_tokens and max_completion_tokens say different things; give one", param="max_completion_tokens"
        )
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: allowed only with logprobs: true", param="top_logprobs")
    goes_on = bool(asked.continue_final_message)
    if goes_on and asked.add_generation_prompt:
        raise ApiError(
            400, "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    urgency = service.urgency(asked, caller)
    service.check(asked, urgency)
    opens = not goes_on and asked.add_generation_prompt is not False
    kwargs = {**(asked.chat_template_kwargs or {}), "add_generation_prompt": opens, "continue_final_message": goes_on}
    prompt = await templated(service, asked.messages, kwargs)
    await service.compile(asked)
    generation = service.start(asked, [prompt], urgency, asked.max_completion_tokens or asked.max_tokens, caller)
    return ChatAnswer(service, asked, generation, caller.request_id)


async def templated(service: Service, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> list[int]:
    """The token ids that the checkpoint's chat template makes of a conversation. Raises ApiError."""
    tokenizer = service.tokenizer()
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
    for reserved in ("tokenize", "conversation", "return_dict", "return_tensors", "chat_template", "padding"):
        if reserved in kwargs:
            raise ApiError(400, f"chat_template_kwargs: {reserved} is not allowed", param="chat_template_kwargs")
    conversation = [_plain(message) for message in messages]
    characters = sum(len(message["role"]) + len(message["content"]) for message in conversation)
    service.check_text(characters, "messages")

    def render() -> list[int]:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
        return list(tokenizer.encode(text, add_special_tokens=False))

    try:
        return await service.in_thread(render, characters)
    except Exception as error:  # a template may refuse a conversation, or fail on one
        raise ApiError(
            400, f"the chat template cannot take these messages: {type(error).__name__}", param="messages"
        ) from error


def _plain(message: ChatMessage) -> dict[str, str]:
    """A message as templates expect it: its parts as one text."""
    parts = message.content
    content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
    name = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content, **name}
