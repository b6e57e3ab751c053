"""Values of settings, from text: each function raises ValueError with what it expected."""

import re
from collections.abc import Callable
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TypeVar

E = TypeVar("E", bound=StrEnum)

# Kafka allows 249 characters per topic name, including what follows the prefix.
TOPIC_PREFIX = re.compile(r"[A-Za-z0-9._-]{0,100}")
MAX_INDEX_DAYS = 3660
MIN_INDEX_BYTES = 64 << 20
"""Below it, a segment (a sixteenth) would have only some thousands of events."""
MAX_INDEX_BYTES = 16 << 40
"""Of SQLite's file, with pages of 4 KiB (its own limit, 4,294,967,294 pages)."""

MAX_PROCESSES = 128
"""More than a machine's cores, and few enough that one page has the metrics of all."""


def networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        found = tuple([ip_network(each.strip()) for each in text.split(",")])
    except ValueError:
        found = ()
    if not found or any(isinstance(each, IPv6Network) and each.subnet_of(_MAPPED) for each in found):
        raise ValueError(f"expected networks such as 10.0.0.0/8,fd00::/8, got {text!r}")
    return found


_MAPPED = IPv6Network("::ffff:0:0/96")
"""IPv4 addresses written as IPv6: they count as IPv4."""


def member_of(kind: type[E]) -> Callable[[str], E]:
    def parse(text: str) -> E:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {', '.join(kind)}, got {text!r}") from None

    return parse


def http_url(text: str) -> str:
    # The text isn't repeated: it may contain a secret.
    if not re.fullmatch(r"https?://[^\s/?#@]+([/?]\S*)?", text):
        raise ValueError("expected an http or https URL without user and fragment")
    return text


def base_url(text: str) -> str:
    """Parse the beginning of addresses: without a slash at its end, so that paths follow it."""
    # The text isn't repeated: it may contain a secret.
    if not re.fullmatch(r"https?://[A-Za-z0-9._~:\[\]-]+(/[A-Za-z0-9._~/-]*)?", text):
        raise ValueError("expected an http or https URL without user, query and fragment")
    return text.rstrip("/")


def header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,100}", text) or text.lower() in _OTHERS_HEADERS:
        raise ValueError(f"expected the name of a header such as X-Forwarded-Email, got {text!r}")
    return text


_OTHERS_HEADERS = frozenset(("authorization", "cookie", "host", "forwarded", "x-forwarded-for", "x-forwarded-host"))
"""Headers that mean something else, or that clients set."""


def ratio(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"expected a number from 0 to 1, got {text!r}")
    return number


def days(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= MAX_INDEX_DAYS:
        raise ValueError(f"expected a number of days from 0.001 to {MAX_INDEX_DAYS}, got {text!r}")
    return float(text)


def size(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB)?", text)
    number = int(found[1]) * _UNITS[found[2] or "B"] if found else 0
    if not MIN_INDEX_BYTES <= number <= MAX_INDEX_BYTES:
        raise ValueError(f"expected a size from 64MiB to 16TiB, such as 8GiB, got {text!r}")
    return number


_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def topic_prefix(text: str) -> str:
    if not TOPIC_PREFIX.fullmatch(text):
        raise ValueError(f"expected at most 100 letters, digits, '.', '_' or '-', got {text!r}")
    return text


def boolean(text: str) -> bool:
    match text.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
        case _:
            raise ValueError(f"expected true or false, got {text!r}")


def process_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_PROCESSES:
        raise ValueError(f"expected a number of processes from 1 to {MAX_PROCESSES}, got {text!r}")
    return int(text)
