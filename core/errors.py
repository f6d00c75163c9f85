"""Every error Slipstream raises on purpose.

SlipstreamError
├── InvalidRequest            400  the caller sent something wrong; `param` names it
│   ├── ContextLengthExceeded 400  prompt and output together do not fit the model
│   ├── UnknownModel          404
│   └── PayloadTooLarge       413
├── Cancelled                 499  the caller went away
├── Overloaded                429  refused at admission; `retry_after` seconds
├── Unavailable               503  no worker can take the request now; `retry_after` seconds
│   └── WorkerLost            503  the worker died while it held the request
├── DeadlineExceeded          504
├── InternalError             500  a defect of ours
│   └── Undrawable            500  no token can be drawn: what the model computed for this request is no law
├── TransferError             500  a hand-off did not commit; never reaches a user unless every fallback failed
│   ├── LayoutMismatch        500  two sides whose caches can't be joined; `field` names the difference
│   ├── ChecksumMismatch      500
│   └── LeaseExpired          500
└── ConfigError               -    a command line, a configuration file or a machine that can't serve it
    └── ModelError            -    a model that can't be found, fetched, read or run

`http_status` and `grpc_status` (the name of a grpc.StatusCode) say how an error leaves the process; `type` and `code`
are the fields of the OpenAI error body. Messages are one line and say what to do.
"""

from __future__ import annotations

import os
from typing import ClassVar


class SlipstreamError(Exception):
    """Base of the tree. `param` is the request field at fault, where there is one."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SlipstreamError):
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class UnknownModel(InvalidRequest):
    http_status = 404
    grpc_status = "NOT_FOUND"
    code = "model_not_found"


class PayloadTooLarge(InvalidRequest):
    http_status = 413
    code = "payload_too_large"


class Cancelled(SlipstreamError):
    http_status = 499
    grpc_status = "CANCELLED"
    type = "cancelled"


class _RetryLater(SlipstreamError):
    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class Overloaded(_RetryLater):
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    type = "rate_limit_error"
    code = "overloaded"


class Unavailable(_RetryLater):
    http_status = 503
    grpc_status = "UNAVAILABLE"
    type = "service_unavailable"


class WorkerLost(Unavailable):
    code = "worker_lost"


class DeadlineExceeded(SlipstreamError):
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    type = "timeout"
    code = "deadline_exceeded"


class InternalError(SlipstreamError):
    pass


class Undrawable(InternalError):
    """Comes of the request and the model, so another worker would not do better."""

    code = "undrawable"


class TransferError(SlipstreamError):
    type = "transfer_error"


class LayoutMismatch(TransferError):
    """`field` is the first field of the two layouts that differs."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class ChecksumMismatch(TransferError):
    pass


class LeaseExpired(TransferError):
    pass


class ConfigError(SlipstreamError):
    """Shown by the command line as one line; exit status 2."""

    type = "config_error"


class ModelError(ConfigError):
    type = "model_error"


BY_CODE: dict[str, type[SlipstreamError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        Cancelled,
        Overloaded,
        Unavailable,
        WorkerLost,
        DeadlineExceeded,
        InternalError,
        Undrawable,
    )
}
"""Errors that may end a request, by the name that travels in `Finish.error`."""


def said_by_system(error: OSError) -> str:
    """In the words of the system: asyncio has a text of its own. Names that are not found have numbers that are no
    errno, below 0, and their words already."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
