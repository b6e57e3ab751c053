"""Signing in and out: a form for tokens, a link to the identity provider, and the way back from there."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from secrets import token_urlsafe

from aiohttp import web

from gateway.access.principal import AccessError
from gateway.access.sessions import OIDC
from gateway.access.sign_in import Offer, SignIn
from gateway.console.forms import SESSION, form_of, require_own_form
from gateway.console.frame import NOBODY, Frame, own, redirect
from gateway.console.text import UI

PATH, PROVIDER, CALLBACK, SIGN_OUT = "/sign-in", "/sign-in/provider", "/sign-in/callback", "/sign-out"
"""Below `/ui`. The third is known to identity providers (`access/oidc.py`)."""
MOST_BYTES, SECONDS = 8192, 5.0
"""Of a form by which somebody signs in, and in which it has to come: strangers send them."""
Answer = Callable[[web.Request, Frame], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignInView:
    """What the page shows: how somebody may sign in, why they don't (None if nothing is wrong), and what follows."""

    offer: Offer
    error: AccessError | None = None
    path: str = UI
    is_signed_out: bool = False
    logout_url: str = ""


Show = Callable[[web.Request, Frame, SignInView], Awaitable[web.StreamResponse]]


class SignInPages:
    """Handles the requests of signing in. `show` makes the page of it."""

    def __init__(self, sign_in: SignIn, show: Show) -> None:
        self._sign_in = sign_in
        self._show = show

    async def page(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        """Show how one signs in."""
        path = own(request.query.get("next", UI))
        return await self._show(request, frame, SignInView(offer=self._sign_in.offer(request), path=path))

    async def with_token(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        """Sign somebody in who sends a token."""
        form = await form_of(request, most=MOST_BYTES, seconds=SECONDS)
        require_own_form(form, request.cookies.get(SESSION, ""), NOBODY)
        path = own(form.text("next"))
        try:
            cookie = self._sign_in.with_token(request, form.text("credential").strip())
        except AccessError as error:
            return await self._show(request, frame, self._view(request, error, path))
        response = redirect(path)
        cookie.put_on(response)
        self._renew_forms(request, response)
        return response

    async def to_provider(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        """Send somebody to the identity provider."""
        path = own(request.query.get("next", UI))
        try:
            address, cookie = await self._sign_in.begin(request, path)
        except AccessError as error:
            return await self._show(request, frame, self._view(request, error, path))
        response = redirect(address)
        cookie.put_on(response)
        return response

    async def from_provider(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        """Sign somebody in whom the identity provider sends back."""
        forgotten = self._sign_in.forget_flow(request)
        try:
            path, cookie = await self._sign_in.finish(request)
        except AccessError as error:
            response = await self._show(request, frame, self._view(request, error, UI))
        else:
            response = redirect(own(path))
            cookie.put_on(response)
            self._renew_forms(request, response)
        if forgotten is not None:
            forgotten.put_on(response)
        return response

    async def sign_out(self, request: web.Request, frame: Frame) -> web.StreamResponse:
        """End somebody's session."""
        principal = self._sign_in.principal_of(request)
        form = await form_of(request)
        require_own_form(form, request.cookies.get(SESSION, ""), principal)
        cookie = self._sign_in.sign_out(request)
        frame.session, frame.is_new = token_urlsafe(32), True
        logout_url = self._sign_in.identity_provider_logout_url() if principal.via == OIDC else ""
        view = SignInView(offer=self._sign_in.offer(request), is_signed_out=True, logout_url=logout_url)
        response = await self._show(request, frame, view)
        if cookie is not None:
            cookie.put_on(response)
        return response

    def _view(self, request: web.Request, error: AccessError, path: str) -> SignInView:
        return SignInView(offer=self._sign_in.offer(request), error=error, path=path)

    def _renew_forms(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let no form go on that was shown to somebody else in this browser."""
        set_forms_cookie(response, token_urlsafe(32), is_secure=self._sign_in.is_secure(request))


def set_forms_cookie(response: web.StreamResponse, session: str, *, is_secure: bool) -> None:
    """Give a browser the cookie that forms belong to."""
    response.set_cookie(SESSION, session, path=UI, httponly=True, samesite="Strict", secure=is_secure)
