"""A session of somebody who has signed in, and a sign-in that is under way: what their cookies say. Pure.

Nothing of a session is kept here: its cookie says who has signed in, how, and when. What they may is looked up in the
access file at each request, so that a line that is changed or removed counts at once, and so does a revoked token. Two
things a cookie can't say by itself: that its session has ended before its time, and that a sign-in has been completed.
`Ended` remembers them, in this process and in bounded memory; in other processes, and for the oldest beyond that, a
copy of the cookie would be good until its time. The browser's own is deleted.
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
"""Seconds after which somebody has to sign in again: a working day, as NIST SP 800-63B has it (section 4.2.3)."""
IDLE = 3600.0
"""Seconds without a request after which a session ends."""
RENEWAL = 60.0
"""Seconds after which a request renews the cookie, which says when the last one was."""
FLOW_AGE = 600.0
"""Seconds that somebody may take with the provider."""
SKEW = 60.0
"""Seconds by which the clocks of processes behind one address may differ."""
MAX_GROUP_BYTES = 1500
"""Of the names of groups that a cookie has room for."""
MAX_PATH = 1024
MAX_ENDED = 10_000
TOKEN_SESSION, OIDC = "token_session", "oidc"
"""How it is known who has a session: by a token that they typed in, or by the provider."""
_FORMAT = 1


@immutable
class Session:
    """Who has signed in: `name` is a token's, or a person's of these `groups`, of those that the file then had.

    `proof` is what the session ends with: the token's digest, or who the provider was. Times are Unix seconds.
    """

    id: str
    how: str
    name: str
    proof: str
    groups: tuple[str, ...] = ()
    signed_in_at: float
    seen_at: float

    def is_over(self, now: float) -> bool:
        """Return whether it has ended by its age, or because nobody has used it."""
        if min(self.signed_in_at, self.seen_at) > now + SKEW:  # by the clock of whoever sealed it, in the future
            return True
        return now >= self.signed_in_at + AGE or now >= self.seen_at + IDLE

    def is_to_be_renewed(self, now: float) -> bool:
        return now >= self.seen_at + RENEWAL

    def seen(self, now: float) -> "Session":
        return replace(self, seen_at=now)

    def encoded(self) -> bytes:
        fields = [self.id, self.how, self.name, self.proof, self.groups, self.signed_in_at, self.seen_at]
        return orjson.dumps([_FORMAT, *fields])


@immutable
class Flow:
    """A sign-in at the provider that is under way in a browser; `path` is the page that follows it."""

    state: str
    nonce: str
    verifier: str
    path: str
    proof: str
    began_at: float

    def is_over(self, now: float) -> bool:
        return not -SKEW <= now - self.began_at < FLOW_AGE

    def encoded(self) -> bytes:
        fields = [self.state, self.nonce, self.verifier, self.path, self.proof, self.began_at]
        return orjson.dumps([_FORMAT, *fields])


def session_of(content: bytes | None) -> Session | None:
    """Return the session that a cookie's content is, None if it is none."""
    fields = _fields(content, 8)
    if fields is None:
        return None
    _, id_, how, name, proof, groups, signed_in_at, seen_at = fields
    return Session(
        id=id_,
        how=how,
        name=name,
        proof=proof,
        groups=tuple(groups),
        signed_in_at=signed_in_at,
        seen_at=seen_at,
    )


def flow_of(content: bytes | None) -> Flow | None:
    """Return the sign-in that a cookie's content is, None if it is none."""
    fields = _fields(content, 7)
    if fields is None:
        return None
    _, state, nonce, verifier, path, proof, began_at = fields
    return Flow(state=state, nonce=nonce, verifier=verifier, path=path, proof=proof, began_at=began_at)


def grant_of(session: Session, access: AccessList, now: float) -> Grant | None:
    """Return what somebody may now by an access file; None if what their session rests on is gone."""
    if session.how == OIDC:
        is_same = access.oidc is not None and proof_of_provider(access.oidc) == session.proof
        return access.person(session.name, session.groups) if is_same else None
    return next(
        (
            each
            for each in access.tokens
            if each.name == session.name and proof_of_token(each) == session.proof
            if each.expires is None or now < each.expires
        ),
        None,
    )


def proof_of_token(grant: Grant) -> str:
    """Return what a session ends with: a token that is made anew under the same name is another."""
    return grant.digest.hex()


def proof_of_provider(provider: Oidc) -> str:
    """Return what sessions by a provider end with: another issuer, client or claim says who somebody is."""
    claims = [provider.name, provider.groups] if provider.groups else [provider.name]
    return sha256("\0".join([provider.issuer, provider.client, *claims]).encode()).hexdigest()[:32]


def kept_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """Return as many groups as there is room for, the first ones: the first that fits is what counts."""
    kept, size = [], 0
    for each in groups:
        size += len(each.encode()) + 3
        if size > MAX_GROUP_BYTES:
            break
        kept.append(each)
    return tuple(kept)


class Ended:
    """Ids of sessions and sign-ins that have ended before their time, until that."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, id_: str, until: float, now: float) -> None:
        while self._until and (len(self._until) >= MAX_ENDED or next(iter(self._until.values())) <= now):
            self._until.popitem(last=False)
        self._until[id_] = until

    def __contains__(self, id_: str) -> bool:
        return id_ in self._until

    def __len__(self) -> int:
        return len(self._until)


def _fields(content: bytes | None, number: int) -> Sequence[Any] | None:
    """Return the fields of what we have sealed, None of another format: of another version of the gateway."""
    if content is None:
        return None
    fields: list[Any] = orjson.loads(content)
    return fields if fields[0] == _FORMAT and len(fields) == number else None
