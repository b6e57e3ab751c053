"""Whose request it is that a parent passes on to a child: by a header, on a socket that only the parent can reach."""

from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from gateway.access.local_request import is_local

PEER = "X-Gateway-Peer"
"""The address from which the parent got the request."""


def headers_of_peer(request: web.Request) -> dict[str, str]:
    """Return what a child is told of a request's other end.

    The parent, which has the request as it came, decides whether it is this machine's own: any other has come through a
    proxy. One without a host has none for the child either, to which the client would send its own.
    """
    host, version = request.headers.get(hdrs.HOST, ""), (request.version.major, request.version.minor)
    headers = {PEER: request.remote or "", hdrs.HOST: host}
    if is_local(request.remote, host, request.headers, version):
        return headers
    return {**headers, hdrs.VIA: f"{version[0]}.{version[1]} gateway"}


@web.middleware
async def as_from_peer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Handle a request as that of the address from which the parent got it."""
    return await handler(request.clone(remote=request.headers.get(PEER, "")))
