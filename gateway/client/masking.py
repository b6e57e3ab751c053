"""Masks credentials in what a destination has responded: it may repeat what we have sent.

They are known by where they are from, not by their form: the values of the rules' references, what a destination adds
to its requests, the parts of its URL that look like tokens, fetched tokens, signatures. Each is masked in the forms in
which a text may have it: as it is, as in a URL, in JSON and HTML, and in base64, whatever is around it there; and each
of these however JSON may escape it (`json_escapes.py`), which its writers do each in their own way.

In a thread, all of this gives way to the event loop: of 1,000 secrets in 4 MiB it takes seconds.
"""

import html
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Self
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from gateway.client.json_escapes import outside, unescaped, without_cut_escape
from gateway.model import Headers
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.rules import Destination, Rules
from gateway.turns import give_way

MASK = b"***"
MIN_SECRET = 4
"""Bytes of the shortest secret that is masked: shorter ones may occur anywhere by chance."""
MIN_VALUE = 8
"""Bytes of the shortest value of a header, or of a query, that counts as a secret."""
MIN_TOKEN, MIN_TOKEN_WITH_DIGITS = 16, 8
"""Characters from which a segment of a URL's path may be a token."""
PUBLIC_HEADERS = frozenset(
    (
        *("accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "content-encoding"),
        *("content-language", "content-type", "origin", "referer", "user-agent"),
    )
)
"""Headers whose values no one keeps secret, in lower case."""
MASKS = 256
"""Masks that are kept at a time."""
SIGNATURE = "webhook-signature"
AUTHORIZATION = frozenset(("authorization", "proxy-authorization"))
"""Headers whose values are credentials, wherever they are from, in lower case."""
LEVELS = 3
"""How many times a text may be in a string of JSON, which is in another one."""
QUOTED_A_TURN = 1 << 10
"""Bytes that are written as in a URL at a time, which takes some 0.2 ms."""
_MARKED = re.compile(rb"\x01+")
_PLAIN = re.compile(rb"[0-9A-Za-z._~-]*")
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_PERCENT = re.compile(rb"%[0-9A-F]{2}")
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{8,}=*")  # as RFC 9110 §11.2 has it, of MIN_VALUE and more


class Mask:
    """What is masked in responses to the requests of one route to one destination.

    `names` are the headers, in lower case, whose values in a request are masked, too; `forms` are masked as they are,
    and `words` where they stand by themselves, however short they are; of several that are at one place, each.
    """

    __slots__ = ("_forms", "_names", "_words")

    def __init__(
        self,
        secrets: Iterable[bytes] = (),
        names: frozenset[bytes] = frozenset(),
        forms: Iterable[bytes] = (),
        words: Iterable[bytes] = (),
    ) -> None:
        found = set[bytes]()
        for secret in secrets:
            give_way()
            if len(secret) >= MIN_SECRET:
                found.update(_forms(secret))
        self._forms = sorted(found.union(forms), key=len, reverse=True)  # one may contain another
        self._names = names
        self._words = [word for word in words if word]

    @classmethod
    def of(cls, destination: Destination, request: RequestTemplate | None, references: Iterable[str]) -> Self:
        """Build it from the rules; `references` are the values of all of their references.

        This takes some time if there are many, so it is worth keeping.
        """
        added = [(name.lower(), value) for name, value in destination.headers]
        secrets = {part for name, value in added if name not in PUBLIC_HEADERS for part in _of_header(_raw(value))}
        secrets.update(_of_url(destination.url), _of_access(destination))
        written = [destination.url, *[value for _, value in added], *_texts(request)]
        secrets.update([_raw(each) for each in references if any(each in text for text in written)])
        names = [SIGNATURE, *[name.lower() for name, _ in (() if request is None else request.headers)]]
        return cls(secrets, frozenset([name.encode() for name in names if name not in PUBLIC_HEADERS]))

    @classmethod
    def of_credentials(
        cls, destination: Destination, request: RequestTemplate | None, references: Iterable[str]
    ) -> Self:
        """Build one of what is a credential for sure, and of MIN_VALUE and more bytes, for where a mistake would hurt.

        That is what `of` has, without what only may be one: parts of a URL, and values of headers, that are written out
        in the rules, and a reference in the URL's host.
        """
        added = [(name.lower(), value) for name, value in destination.headers]
        secrets = {part for name, value in added if name in AUTHORIZATION for part in _of_header(_raw(value))}
        secrets.update(_of_access(destination))
        parts = urlsplit(destination.url)
        written = [parts.path, parts.query, *[value for name, value in added if name not in PUBLIC_HEADERS]]
        written += _texts(request)
        secrets.update([_raw(each) for each in references if any(each in text for text in written)])
        return cls([each for each in secrets if len(each) >= MIN_VALUE])

    def with_sent(self, headers: Headers, tokens: Iterable[bytes] = ()) -> "Mask":
        """Return one that also masks what one request alone has had, and the values of Authorization sent with it."""
        values = [value for name, value in headers if name.lower() in self._names and len(value) >= MIN_VALUE]
        sent = {part for value in (*values, *tokens) for part in _of_header(value)}
        return Mask(sent, self._names, self._forms) if sent else self

    @property
    def longest(self) -> int:
        """Bytes of the longest form of a credential."""
        return len(self._forms[0]) if self._forms else 0

    def is_in(self, text: bytes) -> bool:
        """Return whether the text has one of them."""
        return any(form in each for each in _readings(text) for form in self._forms)

    def masked(self, text: bytes) -> bytes:
        """Return the text without them."""
        return _without(text, self._marks(text, LEVELS, is_cut=False))

    def masked_text(self, text: str) -> str:
        """Do so with a text. Half a character that is left, since one begins or ends in it, becomes U+FFFD."""
        raw = text.encode("utf-8", "surrogateescape")
        shown = self.masked(raw)
        return text if shown == raw else shown.decode("utf-8", "replace")

    def masked_beginning(self, text: bytes) -> bytes:
        """Do so with a text that was cut off, perhaps in the middle of one."""
        return _without(text, self._marks(text, LEVELS, is_cut=True))

    def _marks(self, text: bytes, levels: int, *, is_cut: bool) -> bytes:
        """Return 1 for each byte of the text that is one of them, also of the escapes, so many levels deep; else 0.

        Without any it is empty.
        """
        whole = without_cut_escape(text) if is_cut else text
        inner = unescaped(whole) if levels else whole
        marks = bytearray()
        if inner != whole and (of_inner := self._marks(inner, levels - 1, is_cut=is_cut)):
            marks += outside(whole, of_inner) + of_inner[-1:] * (len(text) - len(whole))
        for start, end in self._found(text):
            marks = marks or bytearray(len(text))
            marks[start:end] = b"\1" * (end - start)
        if is_cut and (begins := min(self._begins(text), self._begins(whole))) < len(whole):
            marks = marks or bytearray(len(text))
            marks[begins:] = b"\1" * (len(text) - begins)
        return bytes(marks)

    def _found(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Yield where they are in a text as it is."""
        for form in self._forms:
            give_way()
            at = text.find(form)
            while at >= 0:
                give_way()
                yield at, at + len(form)
                at = text.find(form, at + len(form))
        for word in self._words:  # each by itself: one expression for all of them is one call, which nothing can stop
            give_way()
            at = text.find(word)
            while at >= 0:
                give_way()
                end = at + len(word)
                if not text[max(0, at - 1) : at].isalnum() and not text[end : end + 1].isalnum():
                    yield at, end
                at = text.find(word, at + 1)

    def _begins(self, text: bytes) -> int:
        """Return where one begins that goes on after the text, or the text's end."""
        begins = len(text)
        for form in self._forms:
            give_way()
            at = text.find(form[:MIN_SECRET], max(0, len(text) - len(form) + 1))
            while at >= 0 and not form.startswith(text[at:]):
                at = text.find(form[:MIN_SECRET], at + 1)
            if at >= 0:
                begins = min(begins, at)
        return begins


class Masks:
    """Masks of the requests of routes to destinations, each kept while the rules are the same: to build one takes time.

    `build` is `Mask.of`, or `Mask.of_credentials`.
    """

    def __init__(self, build: Callable[[Destination, RequestTemplate | None, Iterable[str]], Mask]) -> None:
        self._build = build
        self._kept: dict[tuple[str, str], tuple[Rules, Mask]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, rules: Rules, route: str, request: RequestTemplate | None, destination: Destination) -> Mask:
        """Return the mask for a route's requests to a destination by these rules."""
        pair = route, destination.name
        known, mask = self._kept.get(pair, (None, None))
        if mask is None or known is not rules:
            mask = self._build(destination, request, rules.secret_values)
            if len(self._kept) >= MASKS:
                self._kept.clear()
            self._kept[pair] = rules, mask
        return mask


def _texts(value: object) -> Iterator[str]:
    """Yield the strings in a value of the rules, wherever they are."""
    parts: Iterable[object] = ()
    match value:
        case str():
            yield value
        case Expression():
            yield value.text
        case Mapping():
            parts = (*value.keys(), *value.values())
        case tuple() | list():
            parts = value
        case _ if is_dataclass(value):
            parts = [getattr(value, field.name) for field in fields(value) if field.repr]
        case _:
            pass
    for each in parts:
        yield from _texts(each)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _of_access(destination: Destination) -> Iterator[bytes]:
    """Yield what a destination's requests are signed with, and what its proxy and its tokens' issuer are given."""
    yield from destination.sign
    access = destination.access
    if access is not None and access.oauth2 is not None:
        yield _raw(access.oauth2.client_secret)
    if access is not None and access.proxy is not None and access.proxy.authorization is not None:
        yield from _of_header(_raw(access.proxy.authorization))


def _of_url(url: str) -> Iterator[bytes]:
    """Yield the parts of a URL that may be tokens, and its path after the first part as a whole."""
    parts = urlsplit(url)
    _, *others = parts.path.removeprefix("/").split("/")
    rest = "/".join(others)
    if len(rest) >= MIN_TOKEN:
        yield _raw(rest)
    for segment in parts.path.split("/"):
        if len(segment) >= (MIN_TOKEN_WITH_DIGITS if any(map(str.isdigit, segment)) else MIN_TOKEN):
            yield _raw(segment)
            yield _raw(unquote(segment))
    if parts.query:
        yield _raw(parts.query)
    for _, value in parse_qsl(parts.query):
        if len(value) >= MIN_VALUE:
            yield _raw(value)


def _of_header(value: bytes) -> Iterator[bytes]:
    """Yield a header's value, and the credentials in it: what follows a scheme, a password, whatever may be a token."""
    if len(value) >= MIN_VALUE:
        yield value
    yield from _TOKEN.findall(value)
    scheme, _, credential = value.partition(b" ")
    yield credential
    if scheme.lower() == b"basic":
        try:
            user_and_password = b64decode(credential, validate=True)
        except ValueError:
            return
        yield user_and_password
        yield user_and_password.partition(b":")[2]


def _without(text: bytes, marks: bytes) -> bytes:
    """Return a text with MASK instead of what is marked."""
    shown, at = list[bytes](), 0
    for found in _MARKED.finditer(marks):
        give_way()
        shown += [text[at : found.start()], MASK]
        at = found.end()
    return b"".join([*shown, text[at:]])


def _readings(text: bytes) -> Iterator[bytes]:
    """Yield a text, and what it is without its escapes, once and again."""
    yield text
    for _ in range(LEVELS):
        if (inner := unescaped(text)) == text:
            return
        yield (text := inner)


def _forms(secret: bytes) -> Iterator[bytes]:
    yield secret
    for before in range(3):
        give_way()
        yield from _in_base64(secret, before)
    if _PLAIN.fullmatch(secret):  # of which there are the most, and which all others write as it is
        return
    text = secret.decode("utf-8", "surrogateescape")
    for is_ascii in (False, True):
        give_way()
        in_json = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
        yield _raw(in_json)
        yield _raw(in_json.replace("/", "\\/"))  # as PHP writes it
    yield _raw(html.escape(text))
    for quoted in (partial(quote, safe=""), quote, quote_plus):
        slices = [secret[at : at + QUOTED_A_TURN] for at in range(0, len(secret), QUOTED_A_TURN)]
        yield b"".join([_in_url(each, quoted) for each in slices])
        yield b"".join([_PERCENT.sub(lambda found: found[0].lower(), _in_url(each, quoted)) for each in slices])


def _in_url(part: bytes, quoted: Callable[[bytes], str]) -> bytes:
    give_way()
    return quoted(part).encode()


def _in_base64(secret: bytes, before: int) -> Iterator[bytes]:
    """Yield the characters that it alone decides, with so many bytes `before` it, and any after it."""
    first, end = -(-before * 8 // 6), (before + len(secret)) * 8 // 6
    if end - first >= MIN_SECRET:
        decided = b64encode(bytes(before) + secret)[first:end]
        yield decided
        yield decided.translate(_URL_SAFE)
