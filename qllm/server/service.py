"""One engine behind the routes: prompts to token ids, limits, requests under way, and the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from qllm.executor import Engine, SamplingError
from qllm.executor.model.info import stop_ids
from qllm.executor.model.runner import max_positions
from qllm.executor.sampling.grammar import Grammar
from qllm.server.admission import Admission, longest_token
from qllm.server.errors import ApiError, from_engine, unavailable, unsupported
from qllm.server.protocol import DEFAULTS, Generate
from qllm.server.settings import ApiKey, ServerSettings
from qllm.server.streaming import Choice, Generation, Meter, NoMeter
from qllm.server.urgency import Urgencies, Urgency, wants

T = TypeVar("T")

log = logging.getLogger(__name__)

LONG_TEXT = 1 << 16  #: characters beyond which a text takes the tokenizer so long that others should not wait for it


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        request_id: the request's id, given by the client or made here.
        class_header: the class that a header names.
        key: the API key, where keys are asked for.
    """

    request_id: str
    class_header: str | None = None
    key: ApiKey | None = None


class Service:
    """What all routes need of one engine. Used by asyncio's thread alone.

    Args:
        engine: serves the requests; whoever made it closes it.
        settings: of the server.
        name: what clients call the model.
        meter: is told of every request.

    Attributes:
        max_model_len: tokens of a prompt and its answer together.
        max_prompt_tokens: tokens of a prompt.
        max_prompt_characters: characters of one; None for no bound.
        started: when, in seconds since 1970.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, name: str, meter: Meter | None = None):
        self.engine = engine
        self.settings = settings
        self.name = name
        self.meter: Meter = meter or NoMeter()
        self.admission = Admission(settings)
        self.urgencies = Urgencies(settings, engine.scheduler.policy)
        self.started = int(time.time())
        room = (engine.limits.kv_blocks or 0) * engine.limits.block_size
        self.max_model_len = min(room, max_positions(engine.model.config) or room)
        self.max_prompt_tokens = min(self.max_model_len, settings.max_prompt_tokens or self.max_model_len)
        tokenizer: Any = engine.tokenizer
        longest = longest_token(tokenizer)
        default = None if longest is None else longest * self.max_prompt_tokens
        self.max_prompt_characters = settings.max_prompt_characters or default
        self._stop_ids = stop_ids(engine.model, engine.tokenizer)
        self._defaults = {**DEFAULTS, **engine.defaults}
        self._generations: dict[Generation, Caller] = {}
        # A fast tokenizer works without Python, and several threads may use it: short texts do not wait for long ones.
        self._texts = ThreadPoolExecutor(1, "qllm-texts")
        fast = getattr(tokenizer, "is_fast", False)
        if fast:
            tokenizer.encode("")  # the first call may change its settings, which no thread may see
        self._long_texts = ThreadPoolExecutor(1, "qllm-long-texts") if fast else self._texts

    # ---- prompts -------------------------------------------------------------------------------------------------

    async def in_thread(self, function: Callable[[], T], characters: int = 0) -> T:
        """What `function`, which works with the tokenizer on so many characters for a while, gives."""
        thread = self._long_texts if characters > LONG_TEXT else self._texts
        return await asyncio.get_running_loop().run_in_executor(thread, function)

    def check_text(self, characters: int, param: str = "prompt") -> None:
        """Raise ApiError for a text that can have no room, before the tokenizer works on it."""
        most = self.max_prompt_characters
        if most is not None and characters > most:
            raise ApiError(
                400,
                f"{param}: {characters} characters; allowed: {most}",
                param=param,
                code="context_length_exceeded",
            )

    def check_parts(self, messages: object) -> None:
        """The same for a conversation as it came, whose messages and their parts are not looked at yet."""
        if not isinstance(messages, list):
            return
        contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
        parts = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
        if parts > self.max_prompt_tokens:  # each takes a token at least
            told = f"messages: {parts} messages and parts of such; allowed: {self.max_prompt_tokens}"
            raise ApiError(400, told, param="messages", code="context_length_exceeded")

    def check_prompts(self, prompts: int) -> None:
        """Raise ApiError for more prompts than one request may have."""
        most = self.settings.max_prompts
        if prompts > most:
            raise ApiError(400, f"{prompts} prompts; allowed: at most {most}", param="prompt")

    async def in_background(self, function: Callable[[], T]) -> T:
        """What `function`, which waits for the engine, gives."""
        return await asyncio.get_running_loop().run_in_executor(None, function)

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises ApiError where it has none."""
        if self.engine.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; allowed: prompts of token ids", code="no_tokenizer")
        return self.engine.tokenizer

    def class_hint(self, model: str | None) -> str | None:
        """The suffix of a model's name that names a class. Raises ApiError where no such model is served."""
        if model is None or model == self.name:
            return None
        for suffix in self.settings.model_suffixes:
            if model == self.name + suffix:
                return suffix
        raise ApiError(404, f"model: {model!r:.200} is not served here", param="model", code="model_not_found")

    def urgency(self, asked: Generate, caller: Caller) -> Urgency:
        """The class of a request. Raises ApiError."""
        return self.urgencies.resolve(
            priority=asked.priority,
            tier=asked.service_tier,
            suffix=self.class_hint(asked.model),
            header=caller.class_header,
            key=caller.key,
        )

    # ---- requests ------------------------------------------------------------------------------------------------

    def check(self, asked: Generate, urgency: Urgency, prompts: int = 1) -> None:
        """Raise ApiError for what can be told before the prompts are token ids."""
        settings = self.settings
        n = asked.n or 1
        if n > settings.max_choices:
            raise ApiError(400, f"n is {n}; allowed: at most {settings.max_choices}", param="n")
        stops = _stops(asked)
        if len(stops) > settings.max_stop_strings:
            raise ApiError(
                400, f"stop: {len(stops)} strings; allowed: at most {settings.max_stop_strings}", param="stop"
            )
        if any(len(stop) > settings.max_stop_characters for stop in stops):
            raise ApiError(
                400, f"stop: too long; allowed: at most {settings.max_stop_characters} characters", param="stop"
            )
        if stops and self.engine.tokenizer is None:
            raise unsupported("stop", " by a model without a tokenizer")
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options: allowed only with stream: true", param="stream_options")
        vocabulary = self.engine.vocabulary
        for name, ids in (("stop_token_ids", asked.stop_token_ids), ("logit_bias", asked.logit_bias)):
            if any(int(token) >= vocabulary for token in ids or ()):
                raise ApiError(400, f"{name}: allowed are token ids from 0 to {vocabulary - 1}", param=name)
        self.admission.check(urgency.class_, prompts * n)

    async def compile(self, asked: Generate) -> None:
        """Compile what the text has to be, aside: it may take a while. Raises ApiError."""
        grammar = grammar_of(asked)
        if grammar is not None:
            try:
                await self.in_background(lambda: self.engine.compile(grammar))
            except SamplingError as error:
                raise ApiError(400, str(error), param="response_format") from error

    def start(
        self, asked: Generate, prompts: list[list[int]], urgency: Urgency, max_tokens: int | None, caller: Caller
    ) -> Generation:
        """Submit the requests of one HTTP request, all or none. `max_tokens`: None for what there is room for.

        Raises:
            ApiError: it cannot be served, or not now.
        """
        lengths = [self._length(prompt, max_tokens) for prompt in prompts]
        n = asked.n or 1
        tickets = self.admission.enter(urgency.class_, [len(prompt) for prompt in prompts for _ in range(n)])
        choices: list[Choice] = []
        try:
            for index, ticket in enumerate(tickets):
                stream = self.engine.submit(
                    prompts[index // n],
                    max_new_tokens=lengths[index // n],
                    priority=urgency.priority,
                    **wants(asked, self.settings.classes[urgency.class_]),
                    **self._sampling(asked, index % n),
                )
                choices.append(Choice(index, stream, ticket, self.meter))
        except Exception as error:
            for choice in choices:
                choice.close()
            for ticket in tickets:
                ticket.left()
            raise from_engine(error) from error
        generation = Generation(choices, sum(map(len, prompts)), urgency)
        self._generations[generation] = caller
        return generation

    def under_way(self, id: str, key: ApiKey | None) -> list[Generation]:
        """What that key may know of: the requests with an id, that of the request or that of its answer."""
        names = {id, id.removeprefix("cmpl-"), id.removeprefix("chatcmpl-")}
        mine = [pair for pair in self._generations.items() if not self.settings.api_keys or pair[1].key == key]
        return [generation for generation, caller in mine if caller.request_id in names]

    def ended(self, generation: Generation) -> None:
        """The HTTP request of that generation was answered, or its client is gone."""
        generation.close()
        self._generations.pop(generation, None)

    def _length(self, prompt: list[int], max_tokens: int | None) -> int:
        most = self.settings.max_prompt_tokens
        room = self.max_model_len - len(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty; allowed: at least one token", param="prompt")
        too_long = room < 1 or (most is not None and len(prompt) > most)
        if too_long or room < (max_tokens or 1):
            asked = "" if max_tokens is None else f" and {max_tokens} to generate"
            allowed = f"{self.max_model_len} together" + (f", {most} of them of the prompt" if most else "")
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens{asked}; allowed: {allowed}",
                param="prompt" if too_long else "max_tokens",
                code="context_length_exceeded",
            )
        return room if max_tokens is None else max_tokens

    def _sampling(self, asked: Generate, choice: int) -> dict[str, Any]:
        """What the engine is asked for, the checkpoint's defaults where the client gives nothing."""
        given = {name: getattr(asked, name) for name in self._defaults}
        chosen = {name: default if given[name] is None else given[name] for name, default in self._defaults.items()}
        chosen["top_k"] = max(0, chosen["top_k"])
        if asked.logit_bias:
            chosen["logit_bias"] = {int(token): bias for token, bias in asked.logit_bias.items()}
        chosen["logprobs"] = asked.top
        chosen["grammar"] = grammar_of(asked)
        stops = frozenset() if asked.ignore_eos else self._stop_ids
        chosen["stop"] = [*stops, *(asked.stop_token_ids or ())]
        chosen["stop_strings"] = _stops(asked)
        chosen["skip_special_tokens"] = asked.skip_special_tokens is not False
        chosen["deadline"] = self.settings.request_seconds
        chosen["min_tokens"] = asked.min_tokens or 0
        if asked.seed is not None:
            chosen["seed"] = (asked.seed + choice) % 2**64
        return chosen

    # ---- the end -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine serves."""
        return self.engine.alive

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._generations and self.admission.open == 0

    def close_admission(self) -> None:
        """Let nobody in any more; what was accepted goes on."""
        self.admission.closed = True

    def close(self) -> None:
        """Nobody asks any more."""
        for thread in (self._texts, self._long_texts):
            thread.shutdown(wait=False, cancel_futures=True)

    def end_all(self) -> None:
        """End what is under way: its clients get an error."""
        error = unavailable("the server ended before the answer was complete")
        for generation in list(self._generations):
            generation.stop(error)


def grammar_of(asked: Generate) -> Grammar | None:
    """What the text has to be. Raises ApiError."""
    try:
        return Grammar.response_format(asked.response_format)
    except SamplingError as error:
        raise ApiError(400, str(error), param="response_format") from error


def _stops(asked: Generate) -> list[str]:
    return [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or ())
