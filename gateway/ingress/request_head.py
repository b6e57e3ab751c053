"""What a request's head decides beside its source's scheme: method, size, transfer coding, some handshakes."""

from collections.abc import Sequence
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web

from gateway.ingress.responses import handshake_response, problem_response
from gateway.ingress.server import Connection, TlsConnection
from gateway.ingress.source_endpoint import SourceEndpoint
from gateway.model import RefusedError
from gateway.verify.client_certificates import CertificateProblem
from gateway.verify.request import Request

TRANSFER_ENCODING = b"transfer-encoding"
_VERSIONS = (HttpVersion11, HttpVersion10)
_CERTIFICATE_REASONS = frozenset(CertificateProblem)


def check_head(request: web.BaseRequest, query: str, names: Sequence[bytes], limit: int) -> int:
    """Return the size of the head in bytes, of which `limit` are allowed. Raises RefusedError."""
    if request.version not in _VERSIONS:  # aiohttp reads a line without a version, and HTTP/2.0, as if it were 1.1
        raise RefusedError(400, "malformed_request", "expected HTTP/1.1 or HTTP/1.0")
    if request.method != "POST":
        raise RefusedError(405, "method_not_allowed", f"expected POST, got {request.method[:20]}")
    head_bytes = len(query) + sum([len(name) + len(value) for name, value in request.raw_headers])
    if head_bytes > limit:
        raise RefusedError(431, "head_too_large", f"expected at most {limit} bytes of headers and query")
    if TRANSFER_ENCODING in names:
        if request.version == HttpVersion10:  # RFC 9112 §6.1: what frames its body is uncertain
            raise RefusedError(400, "malformed_request", "expected no Transfer-Encoding with HTTP/1.0")
        headers = zip(names, request.raw_headers, strict=True)
        _refuse_codings([value for name, (_, value) in headers if name == TRANSFER_ENCODING])
    return head_bytes


def check_source(
    request: web.BaseRequest, endpoint: SourceEndpoint, path: str, query: str, fields: dict[str, Any], *, now: float
) -> web.Response | None:
    """Check who a request comes from, before anything else of it; then do as `_unverified_handshake`.

    Raises RefusedError.
    """
    endpoint.check_client(request, fields, now=now)
    return _unverified_handshake(request, endpoint, path, query, fields, now=now)


def refusal_response(request: web.BaseRequest, refusal: RefusedError, *, allow: str) -> web.Response:
    """Return the response to a request that is refused; what is left of it won't be read."""
    response = problem_response(refusal, allow=allow)
    _leave_body(request)
    if refusal.reason in _CERTIFICATE_REASONS and isinstance(request.protocol, TlsConnection):
        response.force_close()  # the next connection is asked for a certificate as the rules are now
    if request.version == HttpVersion10:
        response.force_close()  # its next request may begin elsewhere than we think
    return response


def _leave_body(request: web.BaseRequest) -> None:
    """Tell the connection, if it is still open, that nobody will read what is left of a body."""
    if isinstance(request.protocol, Connection) and request.transport is not None:
        request.protocol.discarded_body = request.content


def _unverified_handshake(
    request: web.BaseRequest, endpoint: SourceEndpoint, path: str, query: str, fields: dict[str, Any], *, now: float
) -> web.Response | None:
    """Return the response to a handshake that its head alone decides; None for every other request."""
    if request.method not in endpoint.handshake_methods:
        return None
    head = Request(request.method, path, query, request.raw_headers, b"")
    handshake = endpoint.source.verifier.unverified_handshake(head, now=now)
    if handshake is None:
        return None
    fields["handshake"] = True
    _leave_body(request)
    return handshake_response(handshake)


def _refuse_codings(values: Sequence[bytes]) -> None:
    """Refuse other transfer codings (RFC 9112 §6.1): we would pass the coded body on without its header."""
    if b",".join(values).strip().lower() != b"chunked":
        raise RefusedError(501, "transfer_coding", "expected no Transfer-Encoding, or `chunked`")
