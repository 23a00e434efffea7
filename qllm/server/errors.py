"""What a client is told when its request is not served: a status, and a body in OpenAI's format."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel

from qllm.executor import EngineBusy, EngineClosed, RequestError, RequestFailed, SamplingError
from qllm.scheduler import RequestShed, SchedulerError

GONE = 499  #: the status of a request whose client went away: nobody reads it


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's format of errors."""

    error: Error


#: What /openapi.json tells of every route.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused"},
    "5XX": {"model": ErrorBody, "description": "The request cannot be answered"},
}


class ApiError(Exception):
    """An answer that is no result.

    Attributes:
        status: the HTTP status.
        message: for the client; it holds no text of the prompt.
        kind: OpenAI's `type`.
        param: the field that is wrong, where one is.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
        class_: of the request, where that was known and made the difference; else empty.
    """

    class_ = ""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


def unsupported(param: str, told: str = "") -> ApiError:
    """The error for a field, or a value of it, that this server knows and does not honour."""
    return ApiError(400, f"{param}: not supported{told}", param=param, code="unsupported_parameter")


def unavailable(message: str, retry_after: float | None = None) -> ApiError:
    """The error while the server ends, or once its engine did."""
    return ApiError(503, message, kind="service_unavailable_error", code="unavailable", retry_after=retry_after)


def gone() -> ApiError:
    """The error that ends what nobody waits for."""
    return ApiError(GONE, "the client went away")


def from_engine(error: Exception) -> ApiError:
    """What the engine raised, as an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosed):
        return unavailable("the engine does not serve any more")
    if isinstance(error, EngineBusy):
        return ApiError(429, "too many requests wait", kind="rate_limit_error", code="queue_full", retry_after=1)
    if isinstance(error, RequestShed):
        return ApiError(429, str(error), kind="rate_limit_error", code="shed", retry_after=5)
    if isinstance(error, RequestError | SamplingError | SchedulerError):
        return ApiError(400, str(error), code="impossible_request")
    if isinstance(error, RequestFailed):
        cause = type(error.__cause__ or error).__name__
        return ApiError(500, f"the pass that the request was in failed: {cause}", kind="server_error", code=cause)
    return ApiError(500, f"internal error: {type(error).__name__}", kind="server_error", code=type(error).__name__)
