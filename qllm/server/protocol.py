"""What a client may ask, field by field. A field that stands here is honoured; any other is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")

AT_ONCE = 256  #: entries of a mapping that are checked together


def _by_and_by(value: Any, check: Callable[[Any], dict[str, T]]) -> dict[str, T]:
    """A mapping checked in parts, so that one full of mistakes is refused at the first of them."""
    if not isinstance(value, dict):
        return check(value)
    checked: dict[str, T] = {}
    entries = iter(value.items())
    while part := dict(islice(entries, AT_ONCE)):
        checked |= check(part)
    return checked


List = Annotated[
    list[T], Field(fail_fast=True)
]  #: pydantic tells all mistakes of a list otherwise; of a long one, for minutes
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[int, Field(ge=1, lt=1 << 31)]
Id = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Text = Annotated[str, Field(min_length=1)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]

#: Of requests that say nothing, where the checkpoint does not either: OpenAI's.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

#: Fields of OpenAI's and vLLM's APIs that are known and not served: the values that ask for nothing are taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template": (None,),
    "documents": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None, "none"),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def known(model: type[BaseModel]) -> list[str]:
    """The keys of a body that is checked by `model`."""
    return [field.alias or name for name, field in model.model_fields.items()]


class Message(BaseModel):
    """A mapping with these keys and no others; a number written as text is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_exist(cls, given: Any) -> Any:
        """The first key that is unknown is told, where pydantic would tell all of them."""
        if isinstance(given, Mapping):
            for key in given:
                if key not in known(cls):
                    context = {"key": str(key)[:80], "message": f"allowed: {', '.join(known(cls))}"}
                    raise PydanticCustomError("unknown_key", "unknown key", context)
        return given


class StreamOptions(Message):
    """What a stream brings besides its text."""

    include_usage: bool = False  #: a last chunk with the number of tokens
    continuous_usage_stats: bool = False  #: the number of tokens so far in every chunk


class Generate(Message):
    """What text completions and chat completions have in common."""

    model: str | None = None  #: the served model's name, with a suffix that names a class where one is configured
    max_tokens: Tokens | None = None  #: tokens to generate, at most
    temperature: Annotated[Number, Field(ge=0)] | None = None  #: 0 is greedy
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None  #: 0 and -1: all tokens
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None  #: least share of the likeliest token's probability
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    #: added to the logits of these token ids
    logit_bias: Annotated[dict[Id, Bias], WrapValidator(_by_and_by)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None  #: choice number i draws with seed + i
    n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None  #: answers to each prompt
    stop: Text | List[Text] | None = None  #: strings before which the text ends
    stop_token_ids: List[TokenId] | None = None  #: token ids that end it, besides the model's own
    skip_special_tokens: bool | None = None  #: special tokens have no text; by default they have none
    ignore_eos: bool | None = None  #: the model's own stop tokens end nothing
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None  #: tokens before which nothing ends it
    response_format: dict[str, Any] | None = None  #: what the text has to be: JSON, or JSON by a schema
    stream: bool | None = None  #: answer by server-sent events
    stream_options: StreamOptions | None = None  #: only where it streams
    priority: Priority | None = None  #: lower is more urgent
    service_tier: str | None = None  #: a tier of the server's configuration
    return_token_ids: bool | None = None  #: the answer holds token ids too
    max_ttft: Annotated[Number, Field(gt=0, le=1e9)] | None = None  #: seconds to the first token; default: the class's
    max_tpot: Annotated[Number, Field(gt=0, le=1e9)] | None = None  #: seconds from token to token; the same
    user: str | None = None  #: whose it is, for policies that are fair to each; stands in the log

    @property
    def top(self) -> int | None:
        """Most likely tokens to report with each chosen one; None for no report."""
        raise NotImplementedError


class CompletionRequest(Generate):
    """The body of /v1/completions."""

    #: text or token ids, or a list of such prompts
    prompt: str | List[TokenId] | List[str] | List[List[TokenId]]
    add_special_tokens: bool | None = None  #: text gets those that the tokenizer adds
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  #: of each token, and of so many most likely ones

    @property
    def top(self) -> int | None:
        return self.logprobs


class TextPart(Message):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Message):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | List[TextPart]
    name: str | None = None  #: for the chat template


class ChatRequest(Generate):
    """The body of /v1/chat/completions."""

    messages: Annotated[List[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None  #: OpenAI's newer name of max_tokens
    add_generation_prompt: bool | None = None  #: the template opens the answer
    continue_final_message: bool | None = None  #: the last message is the beginning of the answer
    chat_template_kwargs: dict[str, Any] | None = None  #: for the chat template
    logprobs: bool | None = None  #: of each token
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  #: and of so many most likely ones

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Message):
    """The body of /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[List[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class PriorityRequest(Message):
    """The body of /v1/requests/ID/priority: a priority, or a class."""

    priority: Priority | None = None  #: lower is more urgent
    class_name: Annotated[str | None, Field(alias="class")] = None  #: a class of the server's configuration


class DetokenizeRequest(Message):
    """The body of /detokenize."""

    model: str | None = None
    tokens: List[TokenId]
