"""What is around each page, and the headers of each response."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from secrets import token_hex

from aiohttp import web

from gateway.access.principal import AccessRole, Principal
from gateway.access.sessions import OIDC, TOKEN_SESSION
from gateway.console.forms import token_of
from gateway.console.text import UI

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",  # with none at all, a browser would not say that a form is of this origin
    "Server": "webhook-gateway",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of each response."""
NOBODY = Principal(name="", role=AccessRole.VIEWER, via="")
"""Whom forms are shown to where it isn't known who looks: they belong to the cookie alone."""


@dataclass(slots=True, kw_only=True)
class Frame:
    """What is around a page. `session` is the cookie that its forms belong to; `is_new`: the browser hasn't it yet."""

    principal: Principal | None = None
    theme: str
    path: str
    session: str
    is_new: bool

    @property
    def token(self) -> str:
        """What a form on the page has to send with it."""
        return token_of(self.session, self.principal or NOBODY)

    @property
    def key(self) -> str:
        """The idempotency key of a form: another one each time."""
        return token_hex(16)

    @property
    def signs_out(self) -> bool:
        """Whether the reader has a session, which they may end."""
        return self.principal is not None and self.principal.via in (OIDC, TOKEN_SESSION)


def own(path: str) -> str:
    """Return a path of the console, for anything else that a form or an address names its first page."""
    is_ours = path == UI or path.startswith((f"{UI}/", f"{UI}?"))
    return path if is_ours and path.isascii() and path.isprintable() and "\\" not in path else UI


def redirect(path: str) -> web.Response:
    return web.Response(status=HTTPStatus.SEE_OTHER, headers={**HEADERS, "Location": path})


def html(body: bytes, headers: Mapping[str, str] | None = None, *, status: int = 200) -> web.Response:
    all_headers = {**HEADERS, "Content-Type": "text/html; charset=utf-8", **(headers or {})}
    return web.Response(body=body, status=status, headers=all_headers)
