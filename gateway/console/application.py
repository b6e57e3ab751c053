"""The console as aiohttp serves it: who looks, which page, and what a browser may do with it."""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from secrets import token_urlsafe
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.access.principal import AccessError
from gateway.access.sign_in import SignIn
from gateway.api.backend import Backend
from gateway.api.problems import ApiError, Code
from gateway.api.shares import Shares
from gateway.console.asking import Asking
from gateway.console.assets import STATIC, Assets
from gateway.console.forms import SESSION, form_of, require_own_form
from gateway.console.frame import CONTENT_SECURITY_POLICY as CONTENT_SECURITY_POLICY  # noqa: PLC0414 - known by this name
from gateway.console.frame import HEADERS, Frame, html, own, redirect
from gateway.console.page import Download, Given, Page, Post, Redirect, Show
from gateway.console.pages import PAGES, POSTS
from gateway.console.sign_in_pages import (
    CALLBACK,
    PATH,
    PROVIDER,
    SIGN_OUT,
    Answer,
    SignInPages,
    SignInView,
    set_forms_cookie,
)
from gateway.console.text import UI
from gateway.telemetry.logs import traceback_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Shown = Page | Download | Redirect
Make = Callable[[web.Request, Asking, Given], Awaitable[Shown]]
AT_A_TIME = 32
"""Pages in the making; what is beyond them is refused, so that they can't take the memory of what is delivered."""
EACH = 16
"""Of these, at most, those of one principal."""
SIGN_INS_AT_A_TIME = 16
"""Of those pages for signing in, which strangers ask for: they take no room from the others."""
THEMES = ("light", "dark")
THEME = "theme"
"""The cookie of the theme that somebody has chosen; without it, that of their system."""
YEAR = 31_536_000
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
    application: web.Application, assets: Assets, backend: Backend, sign_in: SignIn, logger: FilteringBoundLogger
) -> None:
    """Serve the console below `/ui` of an application."""
    console = _Console(assets, backend, sign_in, logger)
    router = application.router
    router.add_get("/", console.to_console)
    router.add_get(f"{UI}/", console.to_console)
    router.add_get(f"{STATIC}/{{name}}", console.static)
    router.add_post(f"{UI}/theme", console.answer("theme", console.theme))
    pages = SignInPages(sign_in, console.sign_in_page)
    router.add_get(f"{UI}{PATH}", console.answer("sign_in", pages.page, is_open=True))
    router.add_post(f"{UI}{PATH}", console.answer("sign_in", pages.with_token, is_open=True))
    router.add_get(f"{UI}{PROVIDER}", console.answer("to_provider", pages.to_provider, is_open=True))
    router.add_get(f"{UI}{CALLBACK}", console.answer("from_provider", pages.from_provider, is_open=True))
    router.add_post(f"{UI}{SIGN_OUT}", console.answer("sign_out", pages.sign_out))
    for path, show in PAGES:
        router.add_get(f"{UI}{path}", console.page(show))
    for post in POSTS:
        router.add_post(f"{UI}{post.path}", console.post(post))
    router.add_route("*", f"{UI}/{{rest:.*}}", console.answer("nothing", console.nothing))


class _Console:
    """Handles requests, so many at a time."""

    def __init__(self, assets: Assets, backend: Backend, sign_in: SignIn, logger: FilteringBoundLogger) -> None:
        self._assets = assets
        self._backend = backend
        self._sign_in = sign_in
        self._logger = logger
        self._files = {each.address: each for each in assets.static.values()}
        self._in_progress = {True: 0, False: 0}
        self._shares = Shares()
        """Pages in the making, those for signing in and the others."""

    async def to_console(self, _: web.Request) -> web.StreamResponse:
        return redirect(UI)

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

    async def theme(self, request: web.Request, _: Frame) -> web.StreamResponse:
        """Keep which theme somebody wants, in a cookie, and go back to where they were."""
        self._sign_in.principal_of(request)
        form = await form_of(request)
        theme, response = form.text("theme"), redirect(own(form.text("back")))
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

    def post(self, post: Post) -> Handler:
        """Return the handler of forms."""

        async def make(request: web.Request, asking: Asking, given: Given) -> Shown:
            asking.must(post.function)
            form = await form_of(request, most=post.most, aside=None if post.most is None else asking.aside)
            require_own_form(form, request.cookies.get(SESSION, ""), asking.principal)
            return await post.act(asking, given, form)

        return self._handler(post.act.__name__, make)

    def _handler(self, name: str, make: Make) -> Handler:
        async def answer(request: web.Request, frame: Frame) -> web.StreamResponse:
            frame.principal = self._sign_in.principal_of(request)
            asking = Asking(backend=self._backend, principal=frame.principal, now=self._backend.log.now())
            with self._shares.place(frame.principal, EACH, "pages"):
                shown = await make(request, asking, Given(request.match_info, request.query))
                response = await self._response(request, frame, asking, shown)
            if (renewal := self._sign_in.renewal(request)) is not None:
                renewal.put_on(response)
            return response

        return self.answer(name, answer)

    def answer(self, name: str, answer: Answer, *, is_open: bool = False) -> Handler:
        """Return a handler that answers, or says why it doesn't.

        One that `is_open` is for those who aren't signed in, and has room of its own: they take none from the others.
        """

        async def handle(request: web.Request) -> web.StreamResponse:
            frame = self._frame(request)
            if self._in_progress[is_open] >= (SIGN_INS_AT_A_TIME if is_open else AT_A_TIME):
                return await self._problem(frame, ApiError(Code.BUSY, "too many pages are being made: try again"))
            self._in_progress[is_open] += 1
            try:
                return await answer(request, frame)
            except AccessError as error:
                return await self._denied(request, frame, error)
            except ApiError as error:
                return await self._problem(frame, error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this page's alone
                self._logger.error("page_failed", page=name, exception=traceback_of(error))
                return await self._problem(frame, ApiError(Code.BUG, "a bug of the gateway: its log has more"))
            finally:
                self._in_progress[is_open] -= 1

        return handle

    async def sign_in_page(self, request: web.Request, frame: Frame, view: SignInView) -> web.StreamResponse:
        """Return the page on which somebody signs in, or why nobody does."""
        if not view.offer.is_any:
            detail = "expected an access file whose line sign-in has this address, got none: nobody signs in here"
            nobody = ApiError(Code.NOT_FOUND, detail)
            return await self._problem(frame, nobody if view.error is None else _denied(view.error))
        frame.principal = None
        error = None if view.error is None else _denied(view.error)
        values = {**self._values(frame, "Signed out" if view.is_signed_out else "Sign in", ""), "view": view}
        status = 200 if view.error is None else view.error.status
        body = self._assets.rendered("sign_in.html", {**values, "error": error})
        response = html(body, view.error.headers if view.error is not None else None, status=status)
        self._keep_forms(request, response, frame)
        return response

    async def _denied(self, request: web.Request, frame: Frame, error: AccessError) -> web.StreamResponse:
        """Return a page on which somebody may sign in who hasn't, or that says why they don't get what they want."""
        offer = self._sign_in.offer(request)
        if error.status != HTTPStatus.UNAUTHORIZED or not offer.is_any:
            return await self._problem(frame, _denied(error))
        path = own(frame.path) if request.method == "GET" else UI
        return await self.sign_in_page(request, frame, SignInView(offer=offer, error=error, path=path))

    async def _response(self, request: web.Request, frame: Frame, asking: Asking, shown: Shown) -> web.Response:
        if isinstance(shown, Download):
            return _download(shown)
        if isinstance(shown, Redirect):
            return redirect(shown.path)
        values = {**self._values(frame, shown.title, shown.section), **shown.values}
        response = html(await asking.aside(lambda: self._assets.rendered(shown.template, values)))
        self._keep_forms(request, response, frame)
        return response

    def _keep_forms(self, request: web.Request, response: web.Response, frame: Frame) -> None:
        if frame.is_new:
            set_forms_cookie(response, frame.session, is_secure=self._sign_in.is_secure(request))

    async def nothing(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        frame.principal = self._sign_in.principal_of(request)
        raise ApiError(Code.NOT_FOUND, "there is no such page")

    def _frame(self, request: web.Request) -> Frame:
        theme = request.cookies.get(THEME, "")
        session = request.cookies.get(SESSION, "")
        return Frame(
            theme=theme if theme in THEMES else "",
            path=request.rel_url.raw_path_qs,
            session=session or token_urlsafe(32),
            is_new=not session,
        )

    def _values(self, frame: Frame, title: str, section: str) -> dict[str, Any]:
        return {"frame": frame, "title": title, "section": section, "now": self._backend.log.now()}

    async def _problem(self, frame: Frame, error: ApiError) -> web.StreamResponse:
        """Return a page that says why there is no other, small enough to be made at once."""
        title = _TITLES.get(error.code, "This page isn't available")
        values = {**self._values(frame, title, ""), "error": error}
        return html(self._assets.rendered("problem.html", values), error.headers, status=error.status)


def _denied(error: AccessError) -> ApiError:
    code = {403: Code.FORBIDDEN, 429: Code.TOO_MANY_REQUESTS}.get(error.status, Code.UNAUTHENTICATED)
    return ApiError(code, error.detail, headers=error.headers)


def _download(file: Download) -> web.Response:
    headers = {
        **HEADERS,
        "Content-Disposition": f'attachment; filename="{file.name}"',
        "Content-Security-Policy": _FILE_POLICY,
        "Content-Type": "application/octet-stream",
    }
    return web.Response(body=file.content, headers=headers)
