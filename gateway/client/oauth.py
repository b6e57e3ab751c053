"""Access tokens from the client-credentials grant (RFC 6749, section 4.4): fetched when needed, kept while valid.

    attempt ─▶ token? ──valid──▶ send ─▶ 401? ──no──▶ accepted
                 │ none, or expired        │ yes, and it may be the token's fault
                 ▼                         ▼
         being fetched? ──yes──▶ wait for it, within the attempt's own deadline
                 │ no
                 ▼
               fetch ─▶ token, for all that wait
                  └──▶ none: all that wait fail, unless only the fetching attempt's deadline has passed

A token is only in memory, until it expires or the process ends; it is never logged nor written to a record.
"""

import asyncio
import math
import re
from base64 import b64encode
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from http import HTTPStatus
from urllib.parse import quote_plus, urlencode

import orjson
from yarl import URL

from gateway.client.http1 import RESPONSE_LIMIT, ResponseReader
from gateway.client.request import USER_AGENT, Outbound
from gateway.rules.rules import DestinationAccess, OAuth2, TokenEndpointAuthMethod

MARGIN = 60.0  # Seconds before its expiry after which a token isn't used: covers an attempt and a clock difference.
MARGIN_SHARE = 0.1  # But at most this share of a short lifetime.
DEFAULT_LIFETIME = 300.0  # For a response without `expires_in`, which is only recommended.
MAX_LIFETIME = 86400.0
REFUSED_TOKEN_MIN_AGE = 60.0
"""A token renewed after a 401 isn't renewed again for this many seconds: if it is rejected too, the token isn't the
cause."""
MAX_RENEWALS, RENEWALS_PERIOD = 5, 60.0
"""Tokens of one destination fetched after 401s in so many seconds: it may reject requests whatever the token."""
SLOTS_LIMIT = 10_000

Fetch = Callable[[Outbound, float], Awaitable[ResponseReader]]
"""Sends a request, giving up at the deadline, and returns its response with the body kept; raises NoTokenError."""


class NoTokenError(Exception):
    """The token endpoint, or its settings in the rules, are at fault. `str()` contains nothing of its response.

    `timed_out`: only the deadline of the requesting attempt has passed.
    """

    def __init__(self, detail: str, *, timed_out: bool = False) -> None:
        super().__init__(f"token endpoint: {detail}")
        self.detail = detail
        self.timed_out = timed_out


class Token:
    """A token, as the value of an Authorization header. `asked_at` is when it, or a newer one, was last requested."""

    __slots__ = ("asked_at", "expires_at", "no_renewal_before", "value")

    def __init__(self, value: bytes, asked_at: float, expires_at: float, no_renewal_before: float) -> None:
        self.value = value
        self.asked_at = asked_at
        self.expires_at = expires_at
        self.no_renewal_before = no_renewal_before


class Tokens:
    """The tokens of all destinations. `clock` is the clock of the deadlines."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._clock = clock
        self._slots: dict[tuple[str, DestinationAccess], _TokenSlot] = {}

    async def get(self, url: str, access: DestinationAccess, deadline: float) -> Token:
        """Return a token for a destination. Raises NoTokenError, by `deadline` at the latest."""
        return await self._get(self._slot(url, access), access, deadline)

    async def recent(self, url: str, access: DestinationAccess, deadline: float, *, max_age: float) -> Token:
        """Return a token for a caller that isn't told about 401s: it is renewed after `max_age` seconds.

        If that fails, the older one is used while it is valid, and another one requested after `max_age` again. Raises
        NoTokenError.
        """
        slot = self._slot(url, access)
        known, now = slot.token, self._clock()
        if known is None or now >= known.expires_at:
            return await self._get(slot, access, deadline)
        if now < known.asked_at + max_age:
            return known
        try:
            return await self._get(slot, access, deadline, instead_of=known)
        except NoTokenError:
            known.asked_at = self._clock()
            return known

    async def renew(self, url: str, access: DestinationAccess, deadline: float, refused: Token) -> Token | None:
        """Return another token than one that got a 401; None if another one is unlikely to help.

        Raises NoTokenError.
        """
        if self._clock() < refused.no_renewal_before:
            return None
        slot = self._slot(url, access)
        if slot.token is refused:
            if not slot.may_renew(self._clock()):
                return None
            slot.token = None
        return await self._get(slot, access, deadline, is_renewal=True)

    def accepted(self, token: Token) -> None:
        """Note that a token was accepted: a later 401 then means that it has become invalid."""
        token.no_renewal_before = 0.0

    def retain_only(self, wanted: Collection[tuple[str, DestinationAccess]]) -> None:
        """Forget the tokens, and the credentials, of all but these destinations."""
        self._slots = {key: slot for key, slot in self._slots.items() if key in wanted}

    async def _get(
        self,
        slot: "_TokenSlot",
        access: DestinationAccess,
        deadline: float,
        *,
        is_renewal: bool = False,
        instead_of: Token | None = None,
    ) -> Token:
        while True:
            now = self._clock()
            if slot.token is not None and slot.token is not instead_of and now < slot.token.expires_at:
                return slot.token
            if slot.pending is None:
                return await self._fetch_for_all(slot, access, deadline, is_renewal=is_renewal)
            pending = slot.pending
            await asyncio.wait([pending], timeout=deadline - now)
            if not pending.done():
                raise NoTokenError("expected a token, got none in time", timed_out=True)
            match pending.result():
                case Token() as token:
                    return token
                case NoTokenError() as error:
                    raise NoTokenError(error.detail) from error
                case None:
                    continue

    async def _fetch_for_all(
        self, slot: "_TokenSlot", access: DestinationAccess, deadline: float, *, is_renewal: bool
    ) -> Token:
        """Fetch a token, also for the attempts that wait meanwhile."""
        assert access.oauth2 is not None
        slot.pending = pending = asyncio.get_running_loop().create_future()
        outcome: Token | NoTokenError | None = None
        try:
            response = await self._fetch(_request(access), deadline)
            value, life = _read(response, str(URL(access.oauth2.token_url).raw_host))
            now = self._clock()
            expires_at = now + life - min(MARGIN, life * MARGIN_SHARE)
            slot.token = outcome = Token(value, now, expires_at, now + REFUSED_TOKEN_MIN_AGE if is_renewal else 0.0)
        except NoTokenError as error:
            outcome = None if error.timed_out else error
            raise
        finally:  # if cancelled, the waiting attempts request one themselves
            slot.pending = None
            pending.set_result(outcome)
        return outcome

    def _slot(self, url: str, access: DestinationAccess) -> "_TokenSlot":
        """Return the slot of one destination: a refusal there says nothing about another's token."""
        slot = self._slots.get((url, access))
        if slot is None:
            if len(self._slots) >= SLOTS_LIMIT:  # left over from reloads
                self._slots = {key: kept for key, kept in self._slots.items() if kept.is_needed(self._clock())}
            slot = self._slots[url, access] = _TokenSlot()
        return slot


class _TokenSlot:
    __slots__ = ("_renewed_at", "pending", "token")

    def __init__(self) -> None:
        self.token: Token | None = None
        self.pending: asyncio.Future[Token | NoTokenError | None] | None = None
        self._renewed_at: deque[float] = deque(maxlen=MAX_RENEWALS)

    def may_renew(self, now: float) -> bool:
        """Return whether another token may be fetched instead of a rejected one; if so, count that."""
        if len(self._renewed_at) == MAX_RENEWALS and now < self._renewed_at[0] + RENEWALS_PERIOD:
            return False
        self._renewed_at.append(now)
        return True

    def is_needed(self, now: float) -> bool:
        return self.pending is not None or (self.token is not None and now < self.token.expires_at)


def _request(access: DestinationAccess) -> Outbound:
    oauth2 = access.oauth2
    assert oauth2 is not None
    fields = {"grant_type": "client_credentials"}
    if oauth2.scope:
        fields["scope"] = " ".join(oauth2.scope)
    if oauth2.audience is not None:
        fields["audience"] = oauth2.audience
    headers = [
        (b"accept", b"application/json"),
        (b"content-type", b"application/x-www-form-urlencoded"),
        USER_AGENT,
    ]
    if oauth2.style is TokenEndpointAuthMethod.BODY:
        fields |= {"client_id": oauth2.client_id, "client_secret": oauth2.client_secret}
    else:
        headers.append((b"authorization", _basic(oauth2)))
    return Outbound(
        url=oauth2.token_url,
        headers=tuple(headers),
        body=urlencode(fields).encode(),
        access=replace(access, oauth2=None) if access.tls or access.proxy else None,
    )


def _basic(oauth2: OAuth2) -> bytes:
    """Return the client's id and secret for a header; each is form-encoded first (RFC 6749, section 2.3.1)."""
    return b"Basic " + b64encode(f"{quote_plus(oauth2.client_id)}:{quote_plus(oauth2.client_secret)}".encode())


def _read(response: ResponseReader, host: str) -> tuple[bytes, float]:
    """Return the header's value and the lifetime in seconds. Raises NoTokenError, with nothing of the response's text.

    RFC 6749, section 5; a type other than bearer would need more than a header.
    """
    if response.status // 100 != 2:  # noqa: PLR2004 - the class of success
        raise NoTokenError(f"{host}: expected a token, got {response.status}{_phrase(response)}")
    if response.body is None:
        raise NoTokenError(
            f"{host}: expected a complete response of at most {RESPONSE_LIMIT} bytes, got a truncated or larger one"
        )
    try:
        document = orjson.loads(response.body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise NoTokenError(f"{host}: expected a JSON object, got something else")
    token = document.get("access_token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise NoTokenError(f"{host}: expected an access_token of visible ASCII characters, got none or an invalid one")
    kind = document.get("token_type", "bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        raise NoTokenError(f"{host}: expected a token of the type bearer, got one of another type")
    return b"Bearer " + token.encode("ascii"), _life(document.get("expires_in"), host)


def _life(value: object, host: str) -> float:
    if value is None:
        return DEFAULT_LIFETIME
    try:
        life = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type] # TypeError is caught
    except (TypeError, ValueError, OverflowError):
        life = math.nan
    if not life >= 0:
        raise NoTokenError(f"{host}: expected expires_in to be a number of seconds, got something else")
    return min(life, MAX_LIFETIME)


def _phrase(response: ResponseReader) -> str:
    """Describe a refusal with known words only: HTTP's phrases, and the codes of RFC 6749, section 5.2."""
    try:
        phrase = f" {HTTPStatus(response.status).phrase}"
    except ValueError:
        phrase = ""
    try:
        document = orjson.loads(response.body or b"")
    except ValueError:
        document = None
    code = document.get("error") if isinstance(document, dict) else None
    return f"{phrase} ({code})" if isinstance(code, str) and code in _CODES else phrase


_TOKEN = re.compile(r"[!-~]+")
_CODES = {
    *("invalid_request", "invalid_client", "invalid_grant"),
    *("unauthorized_client", "unsupported_grant_type", "invalid_scope"),
}
