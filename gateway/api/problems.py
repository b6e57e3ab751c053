"""Why the API doesn't do what is asked: a closed set of problems, told as RFC 9457 wants it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus

from gateway.model import GatewayError


class Code(StrEnum):
    """What a problem is, for programs: its status alone doesn't say."""

    INVALID_REQUEST = "invalid_request"
    """A parameter, or the body, isn't what it has to be."""
    INVALID_QUERY = "invalid_query"
    INVALID_CURSOR = "invalid_cursor"
    INVALID_RULES = "invalid_rules"
    """The rules that were posted have problems."""
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    """Who asks may not: their role is too low, or the request is another site's."""
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTED_BY_INGRESS = "not_accepted_by_ingress"
    """The ingress would refuse what is to be explained."""
    CONFLICT = "conflict"
    """What is asked isn't possible as things are."""
    NOTHING_TO_DO = "nothing_to_do"
    """There is nothing that it would be done with, so nothing is commanded."""
    IN_PROGRESS = "in_progress"
    """A request with the same idempotency key is being answered."""
    KEY_REUSED = "key_reused"
    """The idempotency key belongs to another request."""
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    TOO_MANY_REQUESTS = "too_many_requests"
    INDEX_UNAVAILABLE = "index_unavailable"
    """This process keeps no index, or can't ask it at the moment."""
    LOG_UNAVAILABLE = "log_unavailable"
    RULES_UNAVAILABLE = "rules_unavailable"
    BUSY = "busy"
    """This process has too many such requests at a time."""
    BUG = "bug"


STATUSES: Mapping[Code, int] = {
    Code.INVALID_REQUEST: 400,
    Code.INVALID_QUERY: 400,
    Code.INVALID_CURSOR: 400,
    Code.INVALID_RULES: 422,
    Code.UNAUTHENTICATED: 401,
    Code.FORBIDDEN: 403,
    Code.NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.NOT_ACCEPTED_BY_INGRESS: 422,
    Code.CONFLICT: 409,
    Code.NOTHING_TO_DO: 409,
    Code.IN_PROGRESS: 409,
    Code.KEY_REUSED: 422,
    Code.TOO_LARGE: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.TOO_MANY_REQUESTS: 429,
    Code.INDEX_UNAVAILABLE: 503,
    Code.LOG_UNAVAILABLE: 503,
    Code.RULES_UNAVAILABLE: 503,
    Code.BUSY: 503,
    Code.BUG: 500,
}
RETRY_AFTER = 5
"""Seconds after which what is unavailable may be asked again."""


class ApiError(GatewayError):
    """Who asks, or what they ask for, is at fault, or it isn't available: `detail` says so, to them."""

    def __init__(self, code: Code, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER))

    @property
    def status(self) -> int:
        return STATUSES[self.code]

    @property
    def problem(self) -> "Problem":
        return Problem(title=HTTPStatus(self.status).phrase, status=self.status, detail=self.detail, code=self.code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request got no other answer (RFC 9457): `detail` has a line for each thing that is wrong."""

    title: str
    status: int
    detail: str
    code: Code
    type: str = "about:blank"


def not_found(what: str) -> ApiError:
    """Return the error for what doesn't exist, or isn't for the eyes of who asks: they aren't told which."""
    return ApiError(Code.NOT_FOUND, f"expected {what}, got none of that name")
