"""/v1/completions: text that follows a prompt."""

from __future__ import annotations

from typing import Any

from qllm.executor.engine.text import prompt_ids
from qllm.server.answers.answer import Answer
from qllm.server.answers.logprobs import of_completion
from qllm.server.body import parse
from qllm.server.protocol import CompletionRequest
from qllm.server.service import Caller, Service
from qllm.server.streaming import Piece

TOKENS = 16  #: to generate where the client does not say, as with OpenAI


class CompletionAnswer(Answer):
    """Text completions."""

    prefix = "cmpl"
    whole_object = part_object = "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return self.part(piece, None)

    def part(self, piece: Piece, before: int | None) -> dict[str, Any]:
        logprobs = None if self.asked.top is None else of_completion(piece.tokens, self.texts, before or 0)
        found = {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
        return found | ({"token_ids": [t.id for t in piece.tokens]} if self.asked.return_token_ids else {})


async def completion(service: Service, data: dict[str, Any], caller: Caller) -> CompletionAnswer:
    """Start to answer a request. Raises ApiError."""
    many = data.get("prompt")
    if isinstance(many, list) and _is_list(many):
        service.check_prompts(len(many))
    asked = parse(CompletionRequest, data)
    urgency = service.urgency(asked, caller)
    prompts: list[Any] = list(asked.prompt) if _is_list(asked.prompt) else [asked.prompt]
    service.check(asked, urgency, len(prompts))
    special = asked.add_special_tokens is not False
    if any(isinstance(prompt, str) for prompt in prompts):
        tokenizer = service.tokenizer()
        lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        service.check_text(max(lengths))

        def encode(text: str) -> list[int]:
            return prompt_ids(tokenizer, text) if special else tokenizer.encode(text, add_special_tokens=False)

        prompts = await service.in_thread(
            lambda: [p if isinstance(p, list) else encode(p) for p in prompts], sum(lengths)
        )
    await service.compile(asked)
    generation = service.start(asked, prompts, urgency, asked.max_tokens or TOKENS, caller)
    return CompletionAnswer(service, asked, generation, caller.request_id)


def _is_list(prompt: object) -> bool:
    """Whether it is a list of prompts; a list of token ids is one prompt, and so is an empty one."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
