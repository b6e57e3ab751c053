"""What the head of a request alone decides: its method, its size, its coding, and some handshakes."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from gateway.ingress.endpoint import Endpoint
from gateway.ingress.responses import handshake_response
from gateway.ingress.server import Connection
from gateway.model import RefusedError
from gateway.verify.request import Request

TRANSFER_ENCODING = b"transfer-encoding"


def check_head(request: web.BaseRequest, query: str, names: Sequence[bytes], *, limit: int) -> int:
    """Check method, size and transfer coding of the request head; return its size in bytes. Raises RefusedError."""
    if request.method != "POST":
        raise RefusedError(405, "method_not_allowed", f"expected POST, got {request.method[:20]}")
    head_bytes = len(query) + sum([len(name) + len(value) for name, value in request.raw_headers])
    if head_bytes > limit:
        raise RefusedError(431, "head_too_large", f"expected at most {limit} bytes of headers and query")
    if TRANSFER_ENCODING in names:
        headers = zip(names, request.raw_headers, strict=True)
        _refuse_codings([value for name, (_, value) in headers if name == TRANSFER_ENCODING])
    return head_bytes


def unverified_handshake(
    request: web.BaseRequest, endpoint: Endpoint, path: str, query: str, fields: dict[str, Any], *, now: float
) -> web.Response | None:
    """Return the response to a handshake that its head alone decides; None for every other request."""
    if request.method not in endpoint.handshake_methods:
        return None
    head = Request(request.method, path, query, request.raw_headers, b"")
    handshake = endpoint.source.verifier.unverified_handshake(head, now=now)
    if handshake is None:
        return None
    fields["handshake"] = True
    leave_body(request)
    return handshake_response(handshake)


def leave_body(request: web.BaseRequest) -> None:
    """Tell the connection that nobody will read what is left of a body."""
    if isinstance(request.protocol, Connection):
        request.protocol.unread = request.content


def _refuse_codings(values: Sequence[bytes]) -> None:
    """Refuse other transfer codings (RFC 9112 §6.1): we would pass the coded body on without its header."""
    if b",".join(values).strip().lower() != b"chunked":
        raise RefusedError(
            501, "transfer_coding", "expected no Transfer-Encoding, or `chunked`, got another transfer coding"
        )
