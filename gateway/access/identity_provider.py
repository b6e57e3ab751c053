"""Asks the identity provider by which people sign in: what it says of itself, its keys, its tokens for a code.

All of it goes through the delivery client, whose egress guard is that of the rules. What it says of itself and its keys
are kept as a sender's keys are (`verify/remote_keys.py`): asked for again after an hour, at once for a key that isn't
known, but not twice in ten seconds; and used for a day if nothing answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from gateway.access.oidc import (
    CALLBACK,
    Identity,
    IdTokenError,
    Metadata,
    SignInError,
    authorization_address,
    claims_of,
    code_in,
    discovery_address,
    identity_of,
    key_id_of,
    load_libraries,
    metadata_of,
    token_request,
    tokens_in,
)
from gateway.access.sessions import SignInFlow
from gateway.access.sign_in_lines import Oidc
from gateway.client.client import Client
from gateway.client.oauth import NoTokenError
from gateway.client.request import USER_AGENT, Outbound
from gateway.model import RefusedError, UnfetchedError
from gateway.verify.remote_keys import FRESH, MAX_DOCUMENT_BYTES, PAUSE, USABLE, KeyCache, KeyNeededError

TIMEOUT = 5.0
"""Seconds for each request."""
MAX_ANSWER = 128 * 1024
"""Bytes of an answer with tokens: each may list hundreds of groups."""
AT_A_TIME = 8
"""Sign-ins that ask the identity provider: what is beyond them is refused, as anybody may begin one."""
NO_KEY = "id token: kid: the identity provider publishes no such key"
OpenClient = Callable[[], Awaitable[Client]]
"""Returns the process's client, opened when it is first needed."""


class ProviderUnavailableError(SignInError):
    """The identity provider can't be asked at the moment, or its answer isn't one."""


class IdentityProvider:
    """The identity provider, as far as it is known. `clock` is in Unix seconds."""

    def __init__(self, open_client: OpenClient, *, clock: Callable[[], float]) -> None:
        self._open_client = open_client
        self._clock = clock
        self._keys = KeyCache()
        self._metadata: tuple[Oidc, Metadata, float] | None = None
        self._failed: tuple[Oidc, str, float] | None = None
        self._asking = asyncio.Lock()
        self._in_progress = 0

    def logout_url(self, idp: Oidc) -> str:
        """Return where people end their session with the identity provider, "" if that isn't known."""
        return self._metadata[1].end_session if self._metadata is not None and self._metadata[0] == idp else ""

    async def address(self, idp: Oidc, flow: SignInFlow, origin: str) -> str:
        """Return where somebody is sent to sign in. Raises SignInError."""
        await asyncio.to_thread(load_libraries)
        return authorization_address(idp, await self._known(idp), flow, f"{origin}{CALLBACK}")

    async def identity(self, idp: Oidc, flow: SignInFlow, query: str, origin: str) -> Identity:
        """Return who has come back, with an answer in the query. Raises SignInError."""
        if self._in_progress >= AT_A_TIME:
            raise ProviderUnavailableError("expected few sign-ins at a time, got too many: try again")
        self._in_progress += 1
        try:
            metadata = await self._known(idp)
            code = code_in(query, idp, metadata, flow)
            token, access_token = await self._tokens(idp, metadata, flow, code, origin)
            keys = await self._keys_named(metadata, key_id_of(token))
            now = self._clock()
            claims = claims_of(token, keys, idp, metadata, flow=flow, access_token=access_token, now=now)
            return identity_of(claims, idp)
        finally:
            self._in_progress -= 1

    async def _known(self, idp: Oidc) -> Metadata:
        """Return what it says of itself, which is asked for when it isn't known, or has been for long."""
        async with self._asking:
            now = self._clock()
            known = None
            if self._metadata is not None and self._metadata[0] == idp:
                _, known, at = self._metadata
                if 0 <= now - at < FRESH:
                    return known
                known = known if 0 <= now - at < USABLE else None
            if self._failed is not None and self._failed[0] == idp and 0 <= now - self._failed[2] < PAUSE:
                return _unless_none(known, self._failed[1])
            try:
                document = await self._fetched(discovery_address(idp.issuer))
                found = metadata_of(document, idp)
            except SignInError as error:
                self._failed = idp, str(error), now
                return _unless_none(known, str(error))
            self._metadata, self._failed = (idp, found, now), None
            return found

    async def _tokens(self, idp: Oidc, metadata: Metadata, flow: SignInFlow, code: str, origin: str) -> tuple[str, str]:
        headers, body = token_request(idp, metadata, flow, code, f"{origin}{CALLBACK}")
        outbound = Outbound(url=metadata.token, headers=(*headers, USER_AGENT), body=body)
        client = await self._open_client()
        try:
            deadline = asyncio.get_running_loop().time() + TIMEOUT
            answer = await client.request_token(outbound, deadline, limit=MAX_ANSWER)
        except NoTokenError as error:
            raise ProviderUnavailableError(str(error)) from error
        if answer.status >= 500:  # noqa: PLR2004 - its own fault
            raise ProviderUnavailableError(f"token endpoint of {idp.host}: expected tokens, got {answer.status}")
        return tokens_in(answer.status, answer.body, idp)

    async def _keys_named(self, metadata: Metadata, key_id: str) -> Mapping[str, object]:
        """Return its keys of a name by their types, fetched if none is known. Raises SignInError."""
        async with self._asking:
            try:
                return self._cached(metadata.keys, key_id)
            except KeyNeededError:
                pass
            now = self._clock()
            try:
                self._keys.keep(metadata.keys, await self._fetched(metadata.keys), now)
            except (SignInError, ValueError) as error:
                self._keys.fail(metadata.keys, now)
                try:
                    return self._cached(metadata.keys, key_id)  # one that was there before is good for a day
                except SignInError:
                    got = str(error) if isinstance(error, SignInError) else "expected keys (JWKS)"
                    raise ProviderUnavailableError(f"{metadata.keys}: {got}") from None
            try:
                return self._cached(metadata.keys, key_id)
            except KeyNeededError:  # it has just been fetched
                raise IdTokenError(NO_KEY) from None

    def _cached(self, address: str, key_id: str) -> Mapping[str, object]:
        try:
            found = self._keys.get(address, self._clock(), key_id).by_id.get(key_id)
        except RefusedError as error:
            raise ProviderUnavailableError(f"{address}: its keys aren't available at the moment") from error
        if found is None:
            raise IdTokenError(NO_KEY)
        return found

    async def _fetched(self, address: str) -> bytes:
        client = await self._open_client()
        try:
            return await client.fetch(address, timeout=TIMEOUT, limit=MAX_DOCUMENT_BYTES)
        except UnfetchedError as error:
            raise ProviderUnavailableError(str(error)) from error


def _unless_none(known: Metadata | None, problem: str) -> Metadata:
    if known is None:
        raise ProviderUnavailableError(problem)
    return known
