"""URLs and paths in rule files, also with references whose values aren't known here."""

import re
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

import yarl

from gateway.rules.references import filled, literal_beginning
from gateway.rules.rules import Proxy

PATH = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)+")  # RFC 3986, without percent-encoding
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")  # RFC 1123, and what DNS takes too
_RESERVED_PATHS = frozenset({"/healthz"})
_ORIGIN = re.compile(r"[^/?#]+://[^/?#]*[/?#]")  # a scheme and an authority, and where they end
_ANY = "x"
"""A plausible value of a reference in a path or query."""


def path(value: object) -> str:
    if not isinstance(value, str) or not PATH.fullmatch(value):
        raise ValueError
    if value in _RESERVED_PATHS:
        raise ValueError(f"expected another path, got {value}, which the gateway itself serves")
    return value


def unresolved_path(written: str) -> str:
    """Check a path with unresolved references, up to the first of them."""
    if literal_beginning(written):
        path(filled(written, _ANY))
    return written


def http_url(value: object) -> str:
    """Check a URL. No message shows the URL, since it is often a credential."""
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 - as for any other value
    try:
        url = urlsplit(value)
        _ = url.port  # raises where it is no number
        host = yarl.URL(value).raw_host or ""  # as the client reads it: in lower case, in ASCII by IDNA
    except ValueError:
        raise ValueError("expected an http or https URL, got one that can't be parsed") from None
    if url.scheme not in {"http", "https"}:
        got = f"the scheme {url.scheme!r}" if url.scheme else "one without a scheme"
        raise ValueError(f"expected an http or https URL, got {got}")
    if not url.hostname:
        raise ValueError("expected a URL with a host, got none")
    if "@" in url.netloc:
        raise ValueError("expected a URL without user and password (write them under `auth`), got one with them")
    if url.port == 0:
        raise ValueError("expected a URL with a port from 1 to 65535, got 0")
    if not _HOST.fullmatch(host) and not _is_address(host):
        raise ValueError("expected a URL with a host's name or address, got one with another host")
    if url.fragment or not value.isprintable() or " " in value or "\\" in value:
        raise ValueError("expected a URL without a fragment, spaces or control characters, got one with them")
    return value


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host)) and "%" not in host  # an address with a zone is meaningless on other machines
    except ValueError:
        return False


def unresolved_url(written: str, check: Callable[[object], str] = http_url) -> str:
    """Check a URL with unresolved references, if none is in its scheme, host or port."""
    if _ORIGIN.match(literal_beginning(written)):
        check(filled(written, _ANY))
    return written


def public_url(value: object) -> str:
    url = http_url(value)
    if "?" in url:
        raise ValueError("expected a URL without a query, got one with it")
    return url


def unresolved_public_url(written: str) -> str:
    """Check a public URL as `unresolved_url` does."""
    return unresolved_url(written, public_url)


def proxy(value: object) -> Proxy:
    url = urlsplit(http_url(value))
    if url.scheme != "http" or url.port is None or url.path not in {"", "/"} or url.query:
        raise ValueError("expected a proxy such as http://proxy.internal:3128, got another URL")
    host = yarl.URL(url.geturl()).raw_host
    assert host is not None  # checked by `http_url`
    return Proxy(host=host, port=url.port)


def url_parts(url: str) -> SplitResult:
    """Split a URL. One with unresolved references may have no known parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def literal_host(written: str) -> str | None:
    """Return the host of a URL; None if it depends on an unresolved reference."""
    begins = literal_beginning(written)
    return url_parts(begins).hostname or "" if begins == written or _ORIGIN.match(begins) else None
