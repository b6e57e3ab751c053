"""Contents of the cookies of a session (somebody has signed in), and of a sign-in in progress. No I/O.

Nothing of a session is kept here: its cookie says who has signed in, how, and when. Their permissions are looked up in
the access file at each request, so that a line that is changed or removed counts immediately, and so does a revoked
token. Two things a cookie can't say by itself: that its session has been ended early (by signing out), and that its
sign-in has been completed. `RevokedIds` remembers both, but only in this process, and at most `MAX_REVOKED` of each: in
other processes, or once its id has been evicted, a stolen copy of the cookie works until it expires. Signing out
deletes the browser's own copy; a page that another process sends at that moment may renew it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import orjson

from gateway.access.access_file import AccessList, Grant
from gateway.access.sign_in_lines import Oidc
from gateway.model import immutable

AGE = 12 * 3600.0
"""Seconds after which somebody has to sign in again, active or not (NIST SP 800-63B-4 §2.2.3: at most 24 h)."""
IDLE = 3600.0
"""Seconds without a request after which a session ends (NIST SP 800-63B-4 §2.2.3: at most 1 h)."""
RENEWAL = 60.0
"""Seconds after which a request renews the cookie, which says when the last one was."""
FLOW_AGE = 600.0
"""Seconds that somebody may take to sign in at the identity provider."""
SKEW = 60.0
"""Seconds by which the clocks of processes behind one address may differ."""
MAX_GROUP_BYTES = 1500
"""Maximum bytes of the names of groups in a cookie."""
MAX_PATH = 1024
MAX_REVOKED = 10_000
TOKEN_SESSION, OIDC = "token_session", "oidc"
"""How somebody signed in: by a token that they typed in, or at the identity provider."""
_FORMAT = 1


@immutable
class Session:
    """Who has signed in: `name` is a token's or a person's; `groups` are those of the person that the access file had.

    `binding` is what the session depends on, the token's digest, or a digest of the identity provider's settings: if
    that changes, the session is over. Times are Unix seconds.
    """

    id: str
    how: str
    name: str
    binding: str
    groups: tuple[str, ...] = ()
    signed_in_at: float
    seen_at: float

    def is_over(self, now: float) -> bool:
        """Return whether it has ended by its age, or because nobody has used it."""
        if min(self.signed_in_at, self.seen_at) > now + SKEW:  # sealed by a clock that is ahead
            return True
        return now >= self.signed_in_at + AGE or now >= self.seen_at + IDLE

    def needs_renewal(self, now: float) -> bool:
        return now >= self.seen_at + RENEWAL

    def with_seen_at(self, now: float) -> "Session":
        return replace(self, seen_at=now)

    def encoded(self) -> bytes:
        fields = [self.id, self.how, self.name, self.binding, self.groups, self.signed_in_at, self.seen_at]
        return orjson.dumps([_FORMAT, *fields])


@immutable
class SignInFlow:
    """A sign-in at the identity provider that a browser has begun; `return_path` is the page that follows it."""

    state: str
    nonce: str
    code_verifier: str
    return_path: str
    binding: str
    began_at: float

    def is_over(self, now: float) -> bool:
        return not -SKEW <= now - self.began_at < FLOW_AGE

    def encoded(self) -> bytes:
        fields = [self.state, self.nonce, self.code_verifier, self.return_path, self.binding, self.began_at]
        return orjson.dumps([_FORMAT, *fields])


def decode_session(content: bytes | None) -> Session | None:
    """Decode a session from a cookie's decrypted content; None without one, or in another version's format."""
    fields = _fields(content, 8)
    if fields is None:
        return None
    _, id_, how, name, binding, groups, signed_in_at, seen_at = fields
    return Session(
        id=id_,
        how=how,
        name=name,
        binding=binding,
        groups=tuple(groups),
        signed_in_at=signed_in_at,
        seen_at=seen_at,
    )


def decode_flow(content: bytes | None) -> SignInFlow | None:
    """Decode a sign-in from a cookie's decrypted content; None without one, or in another version's format."""
    fields = _fields(content, 7)
    if fields is None:
        return None
    _, state, nonce, code_verifier, return_path, binding, began_at = fields
    return SignInFlow(
        state=state,
        nonce=nonce,
        code_verifier=code_verifier,
        return_path=return_path,
        binding=binding,
        began_at=began_at,
    )


def grant_of(session: Session, access: AccessList, now: float) -> Grant | None:
    """Return somebody's permissions by an access file; None if their line, or what they signed in with, is gone."""
    if session.how == OIDC:
        is_same = access.oidc is not None and binding_of_identity_provider(access.oidc) == session.binding
        return access.person(session.name, session.groups) if is_same else None
    return next(
        (
            each
            for each in access.tokens
            if each.name == session.name and binding_of_token(each) == session.binding
            if each.expires is None or now < each.expires
        ),
        None,
    )


def binding_of_token(grant: Grant) -> str:
    """Return what a token's sessions are bound to: they end if the token is made anew under the same name."""
    return grant.digest.hex()


def binding_of_identity_provider(idp: Oidc) -> str:
    """Return what its sessions are bound to: they end if the issuer, our client, or a claim for names changes."""
    claims = [idp.name, idp.groups] if idp.groups else [idp.name]
    return sha256("\0".join([idp.issuer, idp.client, *claims]).encode()).hexdigest()[:32]


def kept_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """Return as many groups as a cookie has room for: the first of the access file, whose first line decides."""
    kept, size = [], 0
    for each in groups:
        size += len(each.encode()) + 3
        if size > MAX_GROUP_BYTES:
            break
        kept.append(each)
    return tuple(kept)


class RevokedIds:
    """Ids that must not be accepted again, of sessions ended early and of completed sign-ins, until they expire."""

    __slots__ = ("_expiry_of",)

    def __init__(self) -> None:
        self._expiry_of: OrderedDict[str, float] = OrderedDict()

    def add(self, id_: str, expires_at: float, now: float) -> None:
        while self._expiry_of and (len(self._expiry_of) >= MAX_REVOKED or next(iter(self._expiry_of.values())) <= now):
            self._expiry_of.popitem(last=False)
        self._expiry_of[id_] = expires_at

    def __contains__(self, id_: str) -> bool:
        return id_ in self._expiry_of

    def __len__(self) -> int:
        return len(self._expiry_of)


def _fields(content: bytes | None, count: int) -> Sequence[Any] | None:
    """Return the fields of a cookie's decrypted content; None if it is in another version's format."""
    if content is None:
        return None
    fields: list[Any] = orjson.loads(content)
    return fields if fields[0] == _FORMAT and len(fields) == count else None
