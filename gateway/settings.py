"""Flags and environment → frozen `Settings`. Every flag has a `GATEWAY_…` variable of its name, and the flag wins."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import NamedTuple, TypeVar

from typing_extensions import override

from gateway.model import UsageError
from gateway.setting_values import (
    base_url,
    boolean,
    days,
    header_name,
    http_url,
    member_of,
    networks,
    process_count,
    ratio,
    size,
    topic_prefix,
)

T = TypeVar("T")

PORTS = range(65536)  # 0 lets the system choose one.


class Role(StrEnum):
    """What of the gateway this process runs. `ALL` is ingress and router."""

    ALL = "all"
    INGRESS = "ingress"
    ROUTER = "router"
    CONSOLE = "console"
    """Keeps the index, and neither receives nor delivers."""

    @property
    def receives(self) -> bool:
        return self in (Role.ALL, Role.INGRESS)

    @property
    def delivers(self) -> bool:
        return self in (Role.ALL, Role.ROUTER)


class RecordedAttempts(StrEnum):
    """Which attempts are recorded in `gateway.attempts`."""

    FAILURES = "failures"
    ALL = "all"
    OFF = "off"


class SecurityProtocol(StrEnum):
    """Kafka's security protocols: plaintext or TLS, with or without authentication."""

    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def has_tls(self) -> bool:
        return self in (SecurityProtocol.SSL, SecurityProtocol.SASL_SSL)

    @property
    def has_sasl(self) -> bool:
        return self in (SecurityProtocol.SASL_PLAINTEXT, SecurityProtocol.SASL_SSL)


class SaslMechanism(StrEnum):
    """How we authenticate to brokers."""

    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"
    OAUTHBEARER = "OAUTHBEARER"


class Address(NamedTuple):
    """Where to listen. An IPv6 host is stored without its brackets, and has them as text."""

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
    """`kafka://host:port[,host:port]`: the bootstrap servers, as `host:port`."""

    servers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSecurity:
    """How to connect to Kafka. Secrets are in files, which are read when the log is opened.

    `certificate` is the client certificate, for brokers that require one; its key may be in the same file. `ca` is
    trusted instead of the system's authorities. With OAUTHBEARER, user and password are the client's id and secret (RFC
    6749, section 4.4); `scope` (separated by spaces) and `audience` are those of the requested token.
    """

    protocol: SecurityProtocol = SecurityProtocol.PLAINTEXT
    mechanism: SaslMechanism | None = None
    username: str | None = None
    password_file: Path | None = None
    token_url: str | None = None
    scope: str | None = None
    audience: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """How connections of senders are opened, unless they begin with HTTP.

    `certificates` are files with the ingress's certificates, and those with their keys, which may be the same: with
    them TLS is terminated here. The first one is for clients that ask for another name. `proxies` are the networks of
    those that send a header of the PROXY protocol first, which nobody else may.
    """

    certificates: tuple[tuple[Path, Path], ...] = ()
    proxies: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSettings:
    """The searchable index: its file, how old its events get (days), and how large it may become (bytes).

    The defaults are a week, for which Kafka keeps records by its own default, and what that comes to at ten events a
    second with bodies of a few kilobytes: docs/search.md has the figures.
    """

    file: Path = Path("index.db")
    days: float = 7.0
    bytes: int = 8 << 30
    is_named: bool = False
    """Whether the file was named: role all keeps an index only then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolSettings:
    """Where the ingress stores events while the log accepts none: the file, and the bytes and days that it may hold."""

    file: Path | None = None
    bytes: int = 4 << 30
    days: float = 1.0

    def of_process(self, number: int) -> "SpoolSettings":
        """Return those of one of several processes: each has a file of its own, the first the one that is named."""
        if self.file is None or not number:
            return self
        return replace(self, file=self.file.with_name(f"{self.file.stem}.process-{number}{self.file.suffix}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    """Who may ask at the admin address: those in a file; as whom, proxies of these networks may say in a header.

    Without a file, whoever is on this machine.
    """

    file: Path | None = None
    identity_header: str | None = None
    identity_proxies: tuple[IPv4Network | IPv6Network, ...] = ()

    @property
    def is_configured(self) -> bool:
        return self.file is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of `gateway run`; how events are treated is decided by the rules alone."""

    rules: Path = Path("routes.yaml")
    log: EmbeddedTarget | KafkaTarget = EmbeddedTarget(Path("gateway.db"))
    listen: Address = LISTEN
    admin: Address = ADMIN
    connections: ConnectionSettings = ConnectionSettings()
    role: Role = Role.ALL
    processes: int = 1
    process: int | None = None
    """Of several processes of one `gateway run`, this one's number, from 0 on; None if it is the only one."""
    topic_prefix: str = "gateway."
    dev: bool = False
    attempts: RecordedAttempts = RecordedAttempts.FAILURES
    traces: str | None = None
    """An OpenTelemetry collector's URL."""
    traces_ratio: float = 1.0
    """The fraction of requests to trace if the sender hasn't decided."""
    index: IndexSettings = IndexSettings()
    public_url: str = ""
    """Where senders reach the ingress, for pages and answers to tell them; "" if that isn't known."""
    access: AccessSettings = AccessSettings()
    spool: SpoolSettings = SpoolSettings()
    kafka: KafkaSecurity = KafkaSecurity()

    @property
    def keeps_index(self) -> bool:
        return not self.process and (self.role is Role.CONSOLE or (self.role is Role.ALL and self.index.is_named))

    @property
    def serves_api(self) -> bool:
        """Whether its admin address has the API: a process for senders or deliveries alone has nothing to show.

        Of several processes, the first one has it, with the index.
        """
        return not self.process and self.role in (Role.ALL, Role.CONSOLE)

    @property
    def instance(self) -> str:
        """Which gateway of its host this is: two that run have two names, if their admin ports aren't 0."""
        return str(self.admin.port) if self.process is None else f"{self.admin.port}-{self.process}"

    @property
    def log_names(self) -> tuple[str, ...]:
        """Names of the log, with the topics' prefix: two processes that share one of them have the same log."""
        names = [str(self.log.path.resolve())] if isinstance(self.log, EmbeddedTarget) else self.log.servers
        return tuple([f"{name} {self.topic_prefix}" for name in names])


def from_sources(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Read each setting from `flags` by its field's name, else from `environ`; an empty variable counts as unset.

    Raises UsageError with every problem, one per line: `GATEWAY_LISTEN: expected host:port, got ':x'`.
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
    no_files: tuple[Path, ...] = ()
    certificates = setting("tls_certificate", _paths, no_files)
    keys = setting("tls_key", _paths, certificates)
    if len(keys) != len(certificates):
        problems.append(f"GATEWAY_TLS_KEY: expected a file for each certificate, {len(certificates)}, got {len(keys)}")
    settings = Settings(
        rules=setting("rules", _path, default.rules),
        log=setting("log", log_target, default.log),
        listen=setting("listen", _address, default.listen),
        admin=setting("admin", _address, default.admin),
        connections=ConnectionSettings(
            certificates=tuple(zip(certificates, keys, strict=False)),
            proxies=setting("proxy_protocol", networks, ()),
        ),
        role=setting("role", member_of(Role), default.role),
        processes=setting("processes", process_count, default.processes),
        topic_prefix=setting("topic_prefix", topic_prefix, default.topic_prefix),
        dev=setting("dev", boolean, default.dev),
        attempts=setting("attempts", member_of(RecordedAttempts), default.attempts),
        traces=setting("traces", http_url, default.traces),
        traces_ratio=setting("traces_ratio", ratio, default.traces_ratio),
        index=IndexSettings(
            file=setting("index", _path, default.index.file),
            days=setting("index_days", days, default.index.days),
            bytes=setting("index_bytes", size, default.index.bytes),
            is_named=bool(flags.get("index") or environ.get("GATEWAY_INDEX")),
        ),
        public_url=setting("public_url", base_url, default.public_url),
        access=AccessSettings(
            file=setting("access", _path, None),
            identity_header=setting("identity_header", header_name, None),
            identity_proxies=setting("identity_proxies", networks, ()),
        ),
        spool=SpoolSettings(
            file=setting("spool", _spool_file, None),
            bytes=setting("spool_bytes", size, default.spool.bytes),
            days=setting("spool_days", days, default.spool.days),
        ),
        kafka=KafkaSecurity(
            protocol=setting("kafka_security_protocol", member_of(SecurityProtocol), default.kafka.protocol),
            mechanism=setting("kafka_sasl_mechanism", member_of(SaslMechanism), None),
            username=setting("kafka_sasl_username", str, None),
            password_file=setting("kafka_sasl_password_file", _path, None),
            token_url=setting("kafka_oauth_token_url", http_url, None),
            scope=setting("kafka_oauth_scope", str, None),
            audience=setting("kafka_oauth_audience", str, None),
            ca=setting("kafka_ssl_ca", _path, None),
            certificate=setting("kafka_ssl_certificate", _path, None),
            key=setting("kafka_ssl_key", _path, None),
        ),
    )
    if not problems:
        problems += _missing_of_identity(settings.access)
    if not problems and isinstance(settings.log, KafkaTarget):
        problems += _contradictions(settings.kafka)
    if problems:
        raise UsageError("\n".join(problems))
    return settings


def refuse_useless_spool(settings: Settings) -> None:
    """Raise UsageError for a spool that would never be used, or not help."""
    if settings.spool.file is None:
        return
    if not settings.role.receives:
        raise UsageError(f"--spool: expected it with the role all or ingress, got {settings.role}")
    if isinstance(settings.log, EmbeddedTarget):
        raise UsageError("--spool: expected it with --log kafka://…, got an embedded log, which is on a disk already")


def refuse_useless_processes(settings: Settings) -> None:
    """Raise UsageError for several processes where they can't share the work."""
    if settings.processes == 1:
        return
    if isinstance(settings.log, EmbeddedTarget):
        why = "got an embedded log, whose file belongs to one process"
        raise UsageError(f"--processes: expected it with --log kafka://…, {why}")
    if settings.role is Role.CONSOLE:
        raise UsageError(
            "--processes: expected it with the role all, ingress or router, got console, which keeps one file"
        )


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError(f"expected a file's path, got {text!r}")
    return Path(text)


def _paths(text: str) -> tuple[Path, ...]:
    return tuple([_path(each.strip()) for each in text.split(",")])


def log_target(text: str) -> EmbeddedTarget | KafkaTarget:
    """Parse the URL of a log. Raises ValueError with what was expected."""
    scheme, separator, rest = text.partition("://")
    if "@" in rest:
        # The text isn't repeated: it may contain a password.
        raise ValueError("expected an address without credentials, got one with '@'")
    if separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1 and not rest.endswith("/"):
        return EmbeddedTarget(Path(rest[1:]))
    if separator and scheme == "kafka":
        try:
            return KafkaTarget(tuple(str(_server(server)) for server in rest.rstrip("/").split(",")))
        except ValueError:
            pass
    raise ValueError(f"expected sqlite:///path or kafka://host:port[,host:port], got {text!r}")


def _spool_file(text: str) -> Path:
    try:
        target = log_target(text)
    except ValueError:
        target = None
    if not isinstance(target, EmbeddedTarget):
        # The text isn't repeated: it may contain a password.
        raise ValueError("expected sqlite:///path")  # noqa: TRY004 - it is a text
    return target.path


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


def _contradictions(kafka: KafkaSecurity) -> Iterator[str]:
    """Yield settings of the connection to Kafka that are missing, or would silently not be used."""
    protocol, mechanism = kafka.protocol, kafka.mechanism
    if protocol.has_sasl:
        needed: dict[str, object] = {
            "sasl_mechanism": mechanism,
            "sasl_username": kafka.username,
            "sasl_password_file": kafka.password_file,
        }
        if mechanism is SaslMechanism.OAUTHBEARER:
            needed["oauth_token_url"] = kafka.token_url
        for name, value in needed.items():
            if value is None:
                yield f"GATEWAY_KAFKA_{name.upper()}: expected it with {mechanism or protocol}, got none"
    sasl = {"sasl_mechanism": mechanism, "sasl_username": kafka.username, "sasl_password_file": kafka.password_file}
    oauth = {"oauth_token_url": kafka.token_url, "oauth_scope": kafka.scope, "oauth_audience": kafka.audience}
    tls = {"ssl_ca": kafka.ca, "ssl_certificate": kafka.certificate, "ssl_key": kafka.key}
    for fields, is_used, expected, got in (
        (sasl, protocol.has_sasl, "the security protocol SASL_SSL or SASL_PLAINTEXT", protocol),
        (tls, protocol.has_tls, "the security protocol SSL or SASL_SSL", protocol),
        (oauth, mechanism is SaslMechanism.OAUTHBEARER, "the mechanism OAUTHBEARER", mechanism or "none"),
    ):
        for name, value in fields.items():
            if value is not None and not is_used:
                yield f"GATEWAY_KAFKA_{name.upper()}: expected it with {expected}, got {got}"
    if kafka.key is not None and kafka.certificate is None:
        yield "GATEWAY_KAFKA_SSL_CERTIFICATE: expected it with GATEWAY_KAFKA_SSL_KEY, got none"


def _missing_of_identity(access: AccessSettings) -> Iterator[str]:
    """Yield what is missing for a header that says who somebody is, or would silently not be used."""
    given = {
        "IDENTITY_HEADER": access.identity_header is not None,
        "IDENTITY_PROXIES": bool(access.identity_proxies),
    }
    for name, other in (("IDENTITY_HEADER", "IDENTITY_PROXIES"), ("IDENTITY_PROXIES", "IDENTITY_HEADER")):
        if given[other] and not given[name]:
            yield f"GATEWAY_{name}: expected it with GATEWAY_{other}, got none"
    if any(given.values()) and access.file is None:
        yield "GATEWAY_ACCESS: expected a file that says what each person may, got none"
