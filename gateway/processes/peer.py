"""Whose request it is that a parent passes on to a child: by a header, on a socket that only the parent can reach."""

from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web

PEER = "X-Gateway-Peer"
"""The address from which the parent got the request."""


def headers_of_peer(request: web.Request) -> dict[str, str]:
    """Return what a child is told of a request's other end.

    One of HTTP/1.0 becomes one of HTTP/1.1 that has come through a proxy, which is all that is ever asked about it.
    """
    headers = {PEER: request.remote or ""}
    return headers if request.version >= HttpVersion11 else {**headers, "Via": "1.0 gateway"}


@web.middleware
async def as_from_peer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Handle a request as that of the address from which the parent got it."""
    return await handler(request.clone(remote=request.headers.get(PEER, "")))
