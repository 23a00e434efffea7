"""What clients ask of an engine, checked by type and value before it reaches the engine's thread."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack

from transformers import PreTrainedModel

from qllm.executor.checks import check_id, check_priority, check_request, check_seconds, strings, wants_of
from qllm.executor.engine.clock import Clock
from qllm.executor.engine.loop import Loop
from qllm.executor.engine.requests import Desk, EngineRequest
from qllm.executor.engine.stream import Completion, Stream
from qllm.executor.engine.text import Detokenizer, StopStrings, Tokenizer, chat_ids, prompt_ids, token_ids
from qllm.executor.errors import EngineBusy, EngineClosed, RequestError, SamplingError
from qllm.executor.model.info import embedding, stop_ids
from qllm.executor.sampling.grammar import Grammar, Grammars
from qllm.executor.sampling.params import SamplingArguments, SamplingParams
from qllm.executor.sampling.row_state import prepared
from qllm.scheduler import Request

NOTHING: Mapping[str, Any] = {}

log = logging.getLogger(__name__)


class Frontend:
    """What any thread may ask of an engine, once `_loop` and `clock` are there.

    Args:
        model: is served.
        tokenizer: of its text.
        defaults: arguments of `submit` that its checkpoint recommends.
        seed: of requests that bring none.
        max_waiting: how many requests may wait for their first pass.
    """

    _loop: Loop
    clock: Clock

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        defaults: Mapping[str, Any],
        seed: int | None,
        max_waiting: int | None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = embedding(model).num_embeddings
        self._stop_ids = stop_ids(model, tokenizer)
        self._defaults = dict(defaults)
        self._grammars = Grammars(tokenizer, self.vocabulary, self._stop_ids)
        self._ids = itertools.count()
        self._seed = secrets.randbits(63) if seed is None else int(seed)
        self._desk = Desk(max_waiting)

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments of `submit` that the checkpoint's generation configuration names: temperature, top_k and so on."""
        return dict(self._defaults)

    def submit(
        self,
        prompt: str | Iterable[int],
        *,
        max_new_tokens: int = 16,
        priority: int = 0,
        stop: Iterable[int] | None = None,
        stop_strings: str | Iterable[str] = (),
        skip_special_tokens: bool = True,
        request_id: str | None = None,
        deadline: float | None = None,
        max_ttft: float | None = None,
        max_tpot: float | None = None,
        tenant: str = "",
        tags: Mapping[str, str] | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Stream:
        """Queue a request. Returns at once.

        Args:
            prompt: text, or token ids. Text gets the special tokens that the tokenizer adds, unless it begins with
                them, as that of a chat template does.
            max_new_tokens: tokens to generate, at most.
            priority: lower is more urgent; 0 and below are latency-sensitive to the policies that ship.
            stop: token ids that end the request, the last of its tokens. By default those of the checkpoint's
                generation configuration (else of its config.json) and the tokenizer's; with an empty `stop` there are
                none.
            stop_strings: the request ends with the token by which its text holds one of them. The text ends before it.
                What ends within the first `min_tokens` tokens does not count.
            skip_special_tokens: whether special tokens have no text.
            request_id: for log lines and errors; no other request in the system may have it. By default a number.
            deadline: seconds from now, after which a request that has not ended ends, with "deadline".
            max_ttft: seconds within which its first token is wanted, for policies that go by that (`slack`).
            max_tpot: the same from token to token, on average.
            tenant: whose it is, for policies that are fair to each.
            tags: what else a policy of one's own may go by.
            sampling: the other arguments of `SamplingParams`. By default the likeliest token is chosen: what the
                checkpoint recommends is `**engine.defaults`.

        Returns:
            The stream of its tokens. A stream that is dropped before its end cancels the request.

        Raises:
            RequestError: an argument is not possible, or not with this model.
            SamplingError: a sampling parameter is outside its range.
            EngineBusy: as many requests wait as may.
            EngineClosed: the engine was closed, or broke.
        """
        try:
            stops = self._stop_ids if stop is None else frozenset(token_ids("stop", stop, self.vocabulary))
            params = SamplingParams(stop=stops, **sampling)
            if not isinstance(skip_special_tokens, bool):
                raise RequestError(f"skip_special_tokens is {skip_special_tokens!r:.80}; allowed: True, False")
            decoder = None if self.tokenizer is None else Detokenizer(self.tokenizer, skip_special_tokens)
            texts = strings("stop_strings", stop_strings)
            if texts and decoder is None:
                raise RequestError("stop_strings are given, but the engine has no tokenizer; allowed: none")
            check_seconds("deadline", deadline, zero=False)
            if request_id is not None:
                check_id(request_id)
            now, wants = self.clock.now(), wants_of(max_ttft, max_tpot, tenant, tags)
            sequence = self.make_request(prompt, max_new_tokens, priority, params, now, request_id, wants)
            if self.tokenizer is not None and texts:
                own = Detokenizer(self.tokenizer, skip_special_tokens)
                sequence.stop_strings = StopStrings(own, texts, params.min_tokens)
            sequence.deadline = None if deadline is None else now + deadline
            sequence.desk = self._desk
            self._desk.enter(sequence)
        except (RequestError, SamplingError) as error:
            log.warning("request refused: %s", error)
            raise
        try:
            self._loop.send(lambda: self._loop.add(sequence))
        except EngineClosed:
            self._desk.leave(sequence.request_id)
            raise
        return self.stream_of(sequence, decoder)

    def make_request(
        self,
        prompt: str | Iterable[int],
        max_new_tokens: int,
        priority: int,
        sampling: SamplingParams,
        arrival: float,
        request_id: str | None = None,
        wants: Mapping[str, Any] = NOTHING,
    ) -> EngineRequest:
        """A request, checked against the model but not queued. `arrival`: seconds on the engine's clock."""
        if isinstance(prompt, str):
            prompt = prompt_ids(self.tokenizer, prompt)
        tokens = token_ids("prompt", prompt, self.vocabulary)
        check_request(tokens, max_new_tokens, priority, sampling, self._loop.runner.max_positions)
        sampling, state = prepared(sampling, tokens, self._grammars)
        number = next(self._ids)
        while request_id is None and str(number) in self._desk.requests:  # a client's own id
            number = next(self._ids)
        request = Request(number, len(tokens), int(max_new_tokens), int(priority), arrival, **wants)
        return EngineRequest(
            tokens,
            request=request,
            sampling=sampling,
            seed=(self._seed + number) % 2**64 if sampling.seed is None else sampling.seed,
            request_id=str(number) if request_id is None else request_id,
            state=state,
        )

    def stream_of(self, sequence: EngineRequest, decoder: Detokenizer | None = None) -> Stream:
        """The client's side of a request; there is one."""

        def cancel() -> None:
            with suppress(EngineClosed):  # which has ended it already
                self._loop.send(lambda: self._loop.abort(sequence))

        if decoder is None and self.tokenizer is not None:
            decoder = Detokenizer(self.tokenizer)
        prompt = sequence.tokens[: sequence.request.prompt_tokens]
        return Stream(sequence.request.id, sequence.request_id, prompt, sequence.mailbox, cancel, decoder)

    def generate(
        self,
        prompts: Iterable[str | Iterable[int]],
        *,
        progress: Callable[[int, int], object] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Submit all prompts and wait for all outputs. Where one fails, the others are cancelled.

        Args:
            prompts: each text, or token ids.
            progress: called with (ended, total) from time to time, and at the end.
            settings: the other arguments of `submit`, of each request.

        Returns:
            The outputs, in the order of the prompts.

        Raises:
            EngineBusy: the requests of others fill the queue. Those of this call wait for each other.
            ExecutorError: what `submit` and `Stream.result` raise.
            RequestTooLarge: a request can never fit the KV budget.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise RequestError(f"prompts is {prompts!r:.80}; allowed: prompts, each text or token ids")
        given, streams, done = list(prompts), list[Stream](), list[Completion]()
        try:
            for prompt in given:
                stream = self._submit_when_free(prompt, settings, streams)
                streams.append(stream)
            for number, stream in enumerate(streams):
                done.append(stream.result())
                if progress is not None:
                    progress(number + 1 + sum(s.ended for s in streams[number + 1 :]), len(given))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return done

    def _submit_when_free(
        self, prompt: str | Iterable[int], settings: Mapping[str, Any], before: Sequence[Stream]
    ) -> Stream:
        """Submit; where the queue is full, wait for the first of those `before` that has not ended, and try again."""
        while True:
            try:
                return self.submit(prompt, **settings)
            except EngineBusy:
                waiting = next((stream for stream in before if not stream.ended), None)
                if waiting is None:
                    raise
                waiting.result()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_settings: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Stream:
        """Queue the answer to a conversation, as `submit` does, but sampled as the checkpoint recommends.

        Args:
            messages: such as `{"role": "user", "content": "Hello"}`.
            template_settings: what the tokenizer's chat template takes beside them, such as `tools`.
            settings: the arguments of `submit`; those not given are `engine.defaults` where these name them.

        Raises:
            RequestError: the tokenizer has no chat template, or the messages do not fit it; else as `submit`.
        """
        return self.submit(self.chat_prompt(messages, **(template_settings or {})), **{**self._defaults, **settings})

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_settings: Any) -> list[int]:
        """The token ids of a conversation by the tokenizer's chat template. Raises RequestError."""
        return token_ids("messages", chat_ids(self.tokenizer, messages, template_settings), self.vocabulary)

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar for requests to come, which may take a while. Raises GrammarError."""
        self._grammars.matcher(grammar)

    def reprioritize(self, request: Stream | str, priority: int) -> bool:
        """Change the priority of a request, by its stream or its id, wherever it stands. Returns at once.

        It counts from the next decision on: for the place in the queue, for who decodes, and for which pass may stop
        which. What a pass computes already stays in it. With a priority with which it could never fit the KV budget
        the request keeps the one that it has, and the log says so.

        Returns:
            Whether the request is in the system.

        Raises:
            RequestError: `priority` is none.
        """
        check_priority(priority)
        name = request.request_id if isinstance(request, Stream) else request
        sequence = self._desk.requests.get(name)
        if sequence is None or (isinstance(request, Stream) and request.id != sequence.request.id):
            return False
        with suppress(EngineClosed):
            self._loop.send(lambda: self._loop.reprioritize(sequence, int(priority)))
            return True
        return False
