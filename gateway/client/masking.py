"""Masks credentials in what a destination has responded: it may repeat what we have sent.

They are known by where they are from, not by their form: the values of the rules' references, what a destination adds
to its requests, the parts of its URL that look like tokens, fetched tokens, signatures. Each is masked in the forms in
which a text may have it: as it is, as in a URL, in JSON and HTML, and in base64, whatever is around it there.
"""

import html
import json
import re
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from gateway.client.request import Outbound
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.rules import Destination

MASK = b"***"
MIN_SECRET = 4
"""Bytes of the shortest value of a reference that is masked: shorter ones may occur anywhere by chance."""
MIN_VALUE = 8
"""Bytes of the shortest value of a header that is masked."""
MIN_TOKEN, MIN_TOKEN_WITH_DIGITS = 16, 8
"""Characters from which a segment of a URL's path may be a token."""
PUBLIC_HEADERS = frozenset(
    (
        *("accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "content-encoding"),
        *("content-language", "content-type", "origin", "referer", "user-agent"),
    )
)
"""Headers whose values no one keeps secret, in lower case."""
SIGNATURE = "webhook-signature"
_PERCENT = re.compile(rb"%[0-9A-F]{2}")


class Mask:
    """What is masked in responses to the requests of one route to one destination."""

    __slots__ = ("_forms", "_names")

    def __init__(self, secrets: Iterable[bytes], names: frozenset[bytes] = frozenset()) -> None:
        """`names` are the headers, in lower case, whose values in a request are masked, too."""
        found = {form for secret in secrets if len(secret) >= MIN_SECRET for form in _forms(secret)}
        self._forms = sorted(found, key=len, reverse=True)  # one may contain another
        self._names = names

    @classmethod
    def of(cls, destination: Destination, request: RequestTemplate | None, references: Iterable[str]) -> Self:
        """Build it from the rules; `references` are the values of all of their references.

        Takes some time if there are many of these, so it is worth keeping.
        """
        written = [destination.url, *[value for _, value in destination.headers]]
        written += [] if destination.access is None else _texts((destination.access.oauth2, destination.access.proxy))
        written += _texts(request)
        secrets = {each.encode("utf-8", "surrogateescape") for each in references if _is_in(each, written)}
        secrets.update(_of_url(destination.url), destination.sign)
        access = destination.access
        if access is not None and access.oauth2 is not None:
            secrets.add(access.oauth2.client_secret.encode("utf-8", "surrogateescape"))
        if access is not None and access.proxy is not None and access.proxy.authorization is not None:
            secrets.update(_of_authorization(access.proxy.authorization.encode("ascii")))
        added = [name.lower() for name, _ in destination.headers]
        added += [] if request is None else [name.lower() for name, _ in request.headers]
        names = frozenset([name.encode() for name in (SIGNATURE, *added) if name not in PUBLIC_HEADERS])
        return cls(secrets, names)

    def with_sent(self, outbound: Outbound, tokens: Iterable[bytes] = ()) -> "Mask":
        """Return one that also masks what this request had alone, and the values of Authorization that it was sent with.

        A value of a header that the sender of the event has given isn't ours.
        """
        values = [value for name, value in outbound.headers if name.lower() in self._names and len(value) >= MIN_VALUE]
        sent = {secret for value in (*values, *tokens) for secret in _of_authorization(value)}
        more = Mask(sent)
        more._forms = sorted({*self._forms, *more._forms}, key=len, reverse=True)
        more._names = self._names
        return more

    def masked(self, text: bytes) -> bytes:
        """Return the text without them."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        return text

    def masked_beginning(self, text: bytes) -> bytes:
        """Do so with a text that was cut off, perhaps in the middle of one."""
        text = self.masked(text)
        begins = len(text)
        for form in self._forms:
            at = text.find(form[:MIN_SECRET], max(0, len(text) - len(form) + 1))
            while at >= 0 and not form.startswith(text[at:]):
                at = text.find(form[:MIN_SECRET], at + 1)
            if at >= 0:
                begins = min(begins, at)
        return text if begins == len(text) else text[:begins] + MASK


def _is_in(secret: str, written: Iterable[str]) -> bool:
    return len(secret) >= MIN_SECRET and any(secret in text for text in written)


def _texts(value: object) -> list[str]:
    """Return the strings in a value of the rules, wherever they are."""
    match value:
        case str():
            return [value]
        case bytes():
            return [value.decode("utf-8", "surrogateescape")]
        case Expression():
            return [value.text]
        case Mapping():
            return [text for pair in value.items() for each in pair for text in _texts(each)]
        case tuple() | list():
            return [text for each in value for text in _texts(each)]
        case _ if is_dataclass(value):
            return [text for field in fields(value) if field.repr for text in _texts(getattr(value, field.name))]
        case _:
            return []


def _of_url(url: str) -> Iterator[bytes]:
    """Yield the parts of a URL that may be tokens, and its path after the first part as a whole."""
    parts = urlsplit(url)
    _, *others = parts.path.removeprefix("/").split("/")
    rest = "/".join(others)
    if len(rest) >= MIN_TOKEN:
        yield rest.encode()
    for segment in parts.path.split("/"):
        if len(segment) >= (MIN_TOKEN_WITH_DIGITS if any(map(str.isdigit, segment)) else MIN_TOKEN):
            yield segment.encode()
            yield unquote(segment).encode()
    if parts.query:
        yield parts.query.encode()
    for _, value in parse_qsl(parts.query):
        if len(value) >= MIN_VALUE:
            yield value.encode()


def _of_authorization(value: bytes) -> Iterator[bytes]:
    """Yield a header's value, and the credential in it: a token after its scheme, a password, one of its signatures."""
    yield value
    scheme, _, rest = value.partition(b" ")
    if len(rest) < MIN_SECRET:
        return
    yield rest
    if scheme.lower() == b"basic":
        try:
            user_and_password = b64decode(rest, validate=True)
        except ValueError:
            return
        yield user_and_password
        yield user_and_password.partition(b":")[2]
    else:
        yield from value.split(b" ")[1:]


def _forms(secret: bytes) -> Iterator[bytes]:
    yield secret
    text = secret.decode("utf-8", "surrogateescape")
    for is_ascii in (False, True):
        in_json = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
        yield in_json.encode("utf-8", "surrogateescape")
        yield in_json.replace("/", "\\/").encode("utf-8", "surrogateescape")  # as PHP writes it
    yield html.escape(text).encode("utf-8", "surrogateescape")
    for in_url in (quote(secret, safe=""), quote(secret), quote_plus(secret)):
        yield in_url.encode()
        yield _PERCENT.sub(lambda found: found[0].lower(), in_url.encode())
    for encode in (b64encode, urlsafe_b64encode):
        yield from _in_base64(secret, encode(b"\0" * 0 + secret), 0)
        yield from _in_base64(secret, encode(b"\0" + secret), 1)
        yield from _in_base64(secret, encode(b"\0\0" + secret), 2)


def _in_base64(secret: bytes, encoded: bytes, before: int) -> Iterator[bytes]:
    """Yield the characters that the secret alone decides, with so many bytes before it and any after it."""
    first, end = -(-before * 8 // 6), (before + len(secret)) * 8 // 6
    if end - first >= MIN_SECRET:
        yield encoded[first:end]
