"""Flags and environment → frozen `Settings`. Every flag has a `GATEWAY_…` variable of its name, and the flag wins."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, TypeVar

from typing_extensions import override

from gateway.model import UsageError

T = TypeVar("T")

PORTS = range(65536)  # 0 lets the system choose one.
# Kafka allows 249 characters a topic; what comes after the prefix takes its share.
TOPIC_PREFIX = re.compile(r"[A-Za-z0-9._-]{0,100}")


class Role(StrEnum):
    """Which halves of the gateway this process runs."""

    ALL = "all"
    INGRESS = "ingress"
    ROUTER = "router"


class Address(NamedTuple):
    """Where to listen. An IPv6 host stands without its brackets here, and with them in text."""

    host: str
    port: int

    @override
    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


LISTEN = Address("0.0.0.0", 8080)  # noqa: S104 - senders come from outside
ADMIN = Address("127.0.0.1", 9090)


@dataclass(frozen=True, slots=True)
class EmbeddedTarget:
    """`sqlite:///gateway.db` (relative) or `sqlite:////var/lib/gateway.db` (absolute): the embedded log's file."""

    path: Path


@dataclass(frozen=True, slots=True)
class KafkaTarget:
    """`kafka://host:port[,host:port]`: the brokers to begin with, as `host:port`."""

    servers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `gateway run` is told from outside; how events are treated stands in the rules alone."""

    rules: Path = Path("routes.yaml")
    log: EmbeddedTarget | KafkaTarget = EmbeddedTarget(Path("gateway.db"))
    listen: Address = LISTEN
    admin: Address = ADMIN
    role: Role = Role.ALL
    topic_prefix: str = "gateway."
    dev: bool = False


def from_sources(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Read the settings by their field's name from `flags`, else from `environ`; an empty variable counts as unset.

    Raises UsageError with every problem, one a line: `GATEWAY_LISTEN: expected host:port, got ':x'`.
    """
    problems: list[str] = []

    def setting(name: str, parse: Callable[[str], T], default: T) -> T:
        variable = f"GATEWAY_{name.upper()}"
        where, text = f"--{name.replace('_', '-')}", flags.get(name)
        if text is None:
            where, text = variable, environ.get(variable) or None
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            return default

    default = Settings()
    settings = Settings(
        rules=setting("rules", _path, default.rules),
        log=setting("log", _log, default.log),
        listen=setting("listen", _address, default.listen),
        admin=setting("admin", _address, default.admin),
        role=setting("role", _role, default.role),
        topic_prefix=setting("topic_prefix", _topic_prefix, default.topic_prefix),
        dev=setting("dev", _boolean, default.dev),
    )
    if problems:
        raise UsageError("\n".join(problems))
    return settings


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError(f"expected a file's path, got {text!r}")
    return Path(text)


def _log(text: str) -> EmbeddedTarget | KafkaTarget:
    scheme, separator, rest = text.partition("://")
    if "@" in rest:
        # The text isn't repeated: it may hold a password.
        raise ValueError("expected an address without credentials, got one with '@'")
    if separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1 and not rest.endswith("/"):
        return EmbeddedTarget(Path(rest[1:]))
    if separator and scheme == "kafka":
        try:
            return KafkaTarget(tuple(str(_server(server)) for server in rest.rstrip("/").split(",")))
        except ValueError:
            pass
    raise ValueError(f"expected sqlite:///path or kafka://host:port[,host:port], got {text!r}")


def _server(text: str) -> str:
    if _address(text).port == 0:
        raise ValueError
    return text


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    is_host = bool(host) and not re.search(r"[\s/\[\]@]", host) and (is_bracketed or ":" not in host)
    if not is_host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) not in PORTS:
        raise ValueError(f"expected host:port, got {text!r}")
    return Address(host, int(port))


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise ValueError(f"expected {', '.join(Role)}, got {text!r}") from None


def _topic_prefix(text: str) -> str:
    if not TOPIC_PREFIX.fullmatch(text):
        raise ValueError(f"expected at most 100 letters, digits, '.', '_' or '-', got {text!r}")
    return text


def _boolean(text: str) -> bool:
    match text.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
        case _:
            raise ValueError(f"expected true or false, got {text!r}")
