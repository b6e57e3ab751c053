"""Whose request it is at the admin address."""

from aiohttp import web

from gateway.access.local_request import is_foreign, is_local
from gateway.access.principal import AccessError, AccessRole, Principal

_LOCAL = "a request of a program on this machine, to its loopback address"


class Access:
    """Says who makes each request.

    As long as nobody is given access, whoever has an account on this machine is an operator, and nobody else has any.
    """

    def principal_of(self, request: web.Request) -> Principal:
        """Return who makes a request. Raises AccessError, with a status, if nobody does who may."""
        host = request.headers.get("Host", "")
        if not is_local(request.remote, host, request.headers, (request.version.major, request.version.minor)):
            raise AccessError(401, f"expected {_LOCAL}, got another", headers={"WWW-Authenticate": "Bearer"})
        if is_foreign(request.method, host, request.headers):
            raise AccessError(403, "expected a request of a page from this address, got one of another site's")
        return Principal(name="local", role=AccessRole.OPERATOR, via="loopback")
