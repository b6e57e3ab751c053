"""The console as aiohttp serves it: who looks, which page, and what a browser may do with it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from secrets import token_hex, token_urlsafe
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.access.access import Access
from gateway.access.principal import AccessError, Principal
from gateway.api.backend import Backend
from gateway.api.problems import ApiError, Code
from gateway.console.asking import Asking
from gateway.console.forms import SESSION, form_of, must_be_ours, token_of
from gateway.console.look import STATIC, Look
from gateway.console.page import Act, Download, Given, Page, Redirect, Show
from gateway.console.pages import ACTS, PAGES
from gateway.console.text import UI
from gateway.telemetry.logs import trace_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Shown = Page | Download | Redirect
Make = Callable[[web.Request, Asking, Given], Awaitable[Shown]]
AT_A_TIME = 32
"""Pages in the making; what is beyond them is refused, so that they can't take the memory of what is delivered."""
THEMES = ("light", "dark")
THEME = "theme"
"""The cookie of the theme that somebody has chosen; without it, that of their system."""
YEAR = 31_536_000
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
_FILE_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
_TITLES: Mapping[Code, str] = {
    Code.NOT_FOUND: "Not found",
    Code.FORBIDDEN: "Not allowed",
    Code.INDEX_UNAVAILABLE: "The index isn't available",
    Code.LOG_UNAVAILABLE: "The log isn't available",
    Code.BUSY: "Too much at a time",
    Code.INVALID_CURSOR: "This page of the list is gone",
    Code.BUG: "Something went wrong",
}


def add_console(
    application: web.Application, look: Look, backend: Backend, access: Access, logger: FilteringBoundLogger
) -> None:
    """Serve the console below `/ui` of an application."""
    console = _Console(look, backend, access, logger)
    router = application.router
    router.add_get("/", console.to_console)
    router.add_get(f"{UI}/", console.to_console)
    router.add_get(f"{STATIC}/{{name}}", console.static)
    router.add_post(f"{UI}/theme", console.theme)
    for path, show in PAGES:
        router.add_get(f"{UI}{path}", console.page(show))
    for path, act in ACTS:
        router.add_post(f"{UI}{path}", console.act(act))
    router.add_route("*", f"{UI}/{{rest:.*}}", console.nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What is around each page."""

    principal: Principal | None
    theme: str
    path: str
    session: str

    @property
    def token(self) -> str:
        """What a form on the page has to send with it."""
        assert self.principal is not None
        return token_of(self.session, self.principal)

    @property
    def key(self) -> str:
        """The idempotency key of a form: another one each time."""
        return token_hex(16)


class _Console:
    """Handles requests, so many at a time."""

    def __init__(self, look: Look, backend: Backend, access: Access, logger: FilteringBoundLogger) -> None:
        self._look = look
        self._backend = backend
        self._access = access
        self._logger = logger
        self._files = {each.address: each for each in look.static.values()}
        self._in_progress = 0

    async def to_console(self, _: web.Request) -> web.StreamResponse:
        return _redirect(UI)

    async def static(self, request: web.Request) -> web.StreamResponse:
        """Serve a file of the page's look: there is nothing in it that not everybody may know."""
        found = self._files.get(request.path)
        if found is None:
            return web.Response(status=HTTPStatus.NOT_FOUND, headers=HEADERS, text="expected a file of this version\n")
        headers = {
            **HEADERS,
            "Cache-Control": f"public, max-age={YEAR}, immutable",
            "Content-Security-Policy": _FILE_POLICY,
            "Content-Type": found.content_type,
        }
        return web.Response(body=found.content, headers=headers)

    async def theme(self, request: web.Request) -> web.StreamResponse:
        """Keep which theme somebody wants, in a cookie, and go back to where they were."""
        frame = self._frame(request)
        try:
            self._access.principal_of(request)
            form = await form_of(request)
        except AccessError as error:
            return await self._problem(frame, _denied(error))
        except ApiError as error:
            return await self._problem(frame, error)
        theme, response = form.text("theme"), _redirect(_own(form.text("back")))
        if theme in THEMES:
            response.set_cookie(THEME, theme, path=UI, max_age=YEAR, httponly=True, samesite="Strict")
        else:
            response.del_cookie(THEME, path=UI, httponly=True, samesite="Strict")
        return response

    def page(self, show: Show) -> Handler:
        """Return the handler of a page."""

        async def make(_: web.Request, asking: Asking, given: Given) -> Shown:
            return await show(asking, given)

        return self._handler(show.__name__, make)

    def act(self, act: Act) -> Handler:
        """Return the handler of what a form does."""

        async def make(request: web.Request, asking: Asking, given: Given) -> Shown:
            form = await form_of(request)
            must_be_ours(form, request.cookies.get(SESSION, ""), asking.principal)
            return await act(asking, given, form)

        return self._handler(act.__name__, make)

    def _handler(self, name: str, make: Make) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            frame = self._frame(request)
            if self._in_progress >= AT_A_TIME:
                return await self._problem(frame, ApiError(Code.BUSY, "too many pages are being made: try again"))
            self._in_progress += 1
            try:
                frame = replace(frame, principal=self._access.principal_of(request))
                assert frame.principal is not None
                asking = Asking(backend=self._backend, principal=frame.principal, now=self._backend.log.now())
                shown = await make(request, asking, Given(request.match_info, request.query))
                return await self._response(request, frame, shown)
            except AccessError as error:
                return await self._problem(frame, _denied(error))
            except ApiError as error:
                return await self._problem(frame, error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this page's alone
                self._logger.error("page_failed", page=name, exception=trace_of(error))
                return await self._problem(frame, ApiError(Code.BUG, "a bug of the gateway: its log has more"))
            finally:
                self._in_progress -= 1

        return handle

    async def _response(self, request: web.Request, frame: _Frame, shown: Shown) -> web.Response:
        if isinstance(shown, Download):
            return _download(shown)
        if isinstance(shown, Redirect):
            return _redirect(shown.path)
        values = {**self._values(frame, shown.title, shown.section), **shown.values}
        response = _html(await self._backend.aside(lambda: self._look.rendered(shown.template, values)))
        if request.cookies.get(SESSION) != frame.session:
            response.set_cookie(
                SESSION, frame.session, path=UI, httponly=True, samesite="Strict", secure=request.secure
            )
        return response

    async def nothing(self, request: web.Request) -> web.StreamResponse:
        frame = self._frame(request)
        try:
            frame = replace(frame, principal=self._access.principal_of(request))
        except AccessError as error:
            return await self._problem(frame, _denied(error))
        return await self._problem(frame, ApiError(Code.NOT_FOUND, "there is no such page"))

    def _frame(self, request: web.Request) -> _Frame:
        theme = request.cookies.get(THEME, "")
        return _Frame(
            principal=None,
            theme=theme if theme in THEMES else "",
            path=request.rel_url.raw_path_qs,
            session=request.cookies.get(SESSION) or token_urlsafe(32),
        )

    def _values(self, frame: _Frame, title: str, section: str) -> dict[str, Any]:
        return {"frame": frame, "title": title, "section": section, "now": self._backend.log.now()}

    async def _problem(self, frame: _Frame, error: ApiError) -> web.StreamResponse:
        """Return a page that says why there is no other, small enough to be made at once."""
        title = _TITLES.get(error.code, "This page isn't available")
        values = {**self._values(frame, title, ""), "error": error}
        return _html(self._look.rendered("problem.html", values), error.headers, status=error.status)


def _own(path: str) -> str:
    """Return a path of the console; anything else that a form names is none of ours to send somebody to."""
    is_ours = path == UI or path.startswith((f"{UI}/", f"{UI}?"))
    return path if is_ours and path.isascii() and path.isprintable() and "\\" not in path else UI


def _denied(error: AccessError) -> ApiError:
    code = {403: Code.FORBIDDEN, 429: Code.TOO_MANY_REQUESTS}.get(error.status, Code.UNAUTHENTICATED)
    return ApiError(code, error.detail, headers=error.headers)


def _redirect(path: str) -> web.Response:
    return web.Response(status=HTTPStatus.SEE_OTHER, headers={**HEADERS, "Location": path})


def _html(body: bytes, headers: Mapping[str, str] | None = None, *, status: int = 200) -> web.Response:
    all_headers = {**HEADERS, "Content-Type": "text/html; charset=utf-8", **(headers or {})}
    return web.Response(body=body, status=status, headers=all_headers)


def _download(file: Download) -> web.Response:
    headers = {
        **HEADERS,
        "Content-Disposition": f'attachment; filename="{file.name}"',
        "Content-Security-Policy": _FILE_POLICY,
        "Content-Type": "application/octet-stream",
    }
    return web.Response(body=file.content, headers=headers)
