"""Warnings about valid rules: unused names, weak settings, and what expires."""

import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from urllib.parse import parse_qsl

from gateway.rules import hints
from gateway.rules.addresses import url_parts
from gateway.rules.build import names_of, split_of
from gateway.rules.expressions import Expression
from gateway.rules.redact_paths import redaction_of
from gateway.rules.schema_reader import ParsedMapping, SchemaReader
from gateway.rules.yaml_document import Node
from gateway.turns import give_way
from gateway.verify.key_ring import expired_lists, expiring_secrets
from gateway.verify.schemes import WEAK
from gateway.verify.verifier import Verifier

_CREDENTIAL = re.compile(
    r"token|secret|passw|pwd|credential|authorization|cookie|(api|access|auth|subscription)[-_]?key"
    r"|^key$|(^|[-_])(auth|sig|signature)$",
    re.IGNORECASE,
)
"""Names of headers and parameters whose value is a credential."""
_SECRET_ADDRESS = re.compile(
    r"https://(?:"
    r"hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/"
    r"|(?:\w+\.)?discord(?:app)?\.com/api/(?:v\d+/)?webhooks/"
    r"|[\w.-]+\.webhook\.office\.com/"
    r"|hooks\.zapier\.com/hooks/"
    r"|api\.telegram\.org/bot"
    r")",
    re.IGNORECASE,
)
"""Services that accept messages from anyone who knows the URL."""


class Advice:
    """Adds warnings about complete rules to the reader. `sources`, `destinations` and `routes` are by name."""

    def __init__(
        self,
        reader: SchemaReader,
        sources: Mapping[str, ParsedMapping],
        destinations: Mapping[str, ParsedMapping],
        routes: Mapping[str, ParsedMapping],
    ) -> None:
        self.reader = reader
        self.sources = sources
        self.destinations = destinations
        self.routes = routes

    def report(self, verifiers: Mapping[str, Verifier | None], now: float) -> None:
        """Add all warnings. `now` is in Unix seconds."""
        self._warn_of_unused()
        self._warn_of_patterns()
        self._warn_of_weak(verifiers)
        self._warn_of_expiry(verifiers, now)

    def _warn_of_unused(self) -> None:
        used = {
            (key, name) for route in self.routes.values() for key in ("from", "to") for name in names_of(route, key)
        }
        for key, what, known in (("from", "takes from", self.sources), ("to", "delivers to", self.destinations)):
            for name, read in known.items():
                if (key, name) not in used:
                    message = f"no route {what} {name!r}"
                    self.reader.report(read.node, "unused", message, severity="warning", at_key=True)

    def _warn_of_patterns(self) -> None:
        """Warn about strings in `match` that look like a test, or like a regular expression."""
        for route in self.routes.values():
            for node in _strings_in(route.node.child("match")):
                if test := hints.of_pattern(node.value):
                    message = f"expected {test}, got a string: it is compared as it is"
                    self.reader.report(node, "literal", message, severity="warning")

    def _warn_of_weak(self, verifiers: Mapping[str, Verifier | None]) -> None:
        """Warn about settings that are valid, but protect less than they appear to."""
        for name, verifier in verifiers.items():
            if verifier:
                verify = self.sources[name].node.value["verify"]
                self.reader.locate(verify, verifier.warnings, code="weak", severity="warning")
            self._warn_of_weak_path(self.sources[name].node.child("path"))
            self._warn_of_response(self.sources[name], verifier)
            self._warn_of_redaction(self.sources[name])
        for read in self.destinations.values():
            if sign := read.values.get("sign"):
                for key, node in zip(sign.values["secrets"], sign.node.value["secrets"].value, strict=True):
                    if len(key) < WEAK:
                        message = f"expected a secret of at least {WEAK} bytes, got a shorter one, which can be guessed"
                        self.reader.report(node, "weak", message, severity="warning")
            if is_in_the_clear(read.values["url"]) and (credential := credential_of(read)):
                message = f"expected https with {credential}, got http: it is sent unencrypted"
                self.reader.report(read.node.value["url"], "weak", message, severity="warning")
            oauth2 = auth.values.get("oauth2") if (auth := read.values.get("auth")) else None
            if oauth2 and is_in_the_clear(oauth2.values["token_url"]):
                message = "expected https with `client_secret`, got http: it is sent unencrypted"
                self.reader.report(oauth2.node.value["token_url"], "weak", message, severity="warning")
            proxy = read.values.get("proxy")
            if proxy and "proxy_auth" in read.values and not _is_this_machine(proxy.host):
                message = "expected a proxy on this machine with `proxy_auth`, got another: it is sent unencrypted"
                self.reader.report(read.node.value["proxy"], "weak", message, severity="warning")

    def _warn_of_redaction(self, read: ParsedMapping) -> None:
        """Warn about what is made of hidden values, and isn't hidden itself."""
        if not (paths := read.values.get("redact")):
            return
        redaction = redaction_of(paths)
        for name in ("id", "type", "key"):
            expression = read.values.get(name)
            if not isinstance(expression, Expression) or (name != "id" and expression.is_field):
                continue  # what is such a value is hidden, too
            fields = [
                (each.root, [segment.key for segment in each.segments if segment.key is not None])
                for each in expression.fields
            ]
            if any(redaction.touches(*field) for field in fields):
                told = "by which events are found" if name == "id" else "which is shown"
                message = f"expected `{name}` of what isn't hidden, got one of what `redact` hides, {told}"
                self.reader.report(read.node.value[name], "weak", message, severity="warning")

    def _warn_of_response(self, read: ParsedMapping, verifier: Verifier | None) -> None:
        """Warn about expressions in `respond` that have no value for a request with several events."""
        respond = read.values.get("respond")
        split = split_of(read.values.get("split"), None if verifier is None else verifier.split)
        if respond is None or split is None:
            return
        templates = {"body": respond.values.get("body")}
        templates |= {f"headers.{name}": value for name, value in respond.values.get("headers", {}).items()}
        for name, template in templates.items():
            if template is not None and template.has_expressions:
                instead = "is their ids" if name == "body" else "doesn't have it"
                message = f"`{name}` has expressions: the response to several events {instead}"
                self.reader.report(respond.node, "unused", message, severity="warning", at_key=True)

    def _warn_of_expiry(self, verifiers: Mapping[str, Verifier | None], now: float) -> None:
        """Warn about secrets that expire, and about routes that have expired.

        If all secrets of a source have expired, that is no error here: a restart would stop all other sources, too.
        """
        for route in self.routes.values():
            if (at := route.values.get("expires")) is not None and at <= now:
                message = "the route has expired: it matches no event any more"
                self.reader.report(route.node.value["expires"], "expiring", message, severity="warning")
        for name, verifier in verifiers.items():
            if verifier is None or not verifier.lifetimes:
                continue
            verify = self.sources[name].node.value["verify"]
            self.reader.locate(
                verify, list(expiring_secrets(verifier.lifetimes, now)), code="expiring", severity="warning"
            )
            message = "expected a secret that hasn't expired, got none: every request is refused"
            expired = [((key,), message) for key in expired_lists(verifier.lifetimes, now)]
            self.reader.locate(verify, expired, code="expired", severity="warning")

    def _warn_of_weak_path(self, node: Node | None) -> None:
        if node is None or node in self.reader.unresolved or self.reader.secret_lengths.get(node, WEAK) >= WEAK:
            return
        message = f"expected a secret of at least {WEAK} characters, got a shorter one, which can be guessed"
        self.reader.report(node, "weak", message, severity="warning")


def _strings_in(node: Node | None) -> Iterator[Node]:
    give_way()
    if node is not None and isinstance(node.value, str):
        yield node
    elif node is not None and isinstance(node.value, list | dict):
        entries = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        for name, child in entries:
            if name != "is":  # `is` says that it isn't a pattern
                yield from _strings_in(child)


def written_credential(read: ParsedMapping) -> tuple[Node, str] | None:
    """Return the node of a destination's literal credential, and what it is in; None if all are references.

    URLs that are credentials themselves are only recognised for the best-known services.
    """
    url = read.node.value["url"]
    if isinstance(url.value, str) and "${" not in url.value.replace("$${", ""):
        if _SECRET_ADDRESS.match(url.value):
            return url, "an address by which anybody can send"
        for name, value in parse_qsl(url_parts(url.value).query):
            if value and _CREDENTIAL.search(name):
                return url, f"`{name}` in its query"
    own = read.node.child("headers")
    for name, node in own.value.items() if own is not None and isinstance(own.value, dict) else ():
        if isinstance(node.value, str) and _CREDENTIAL.search(name) and "${" not in node.value.replace("$${", ""):
            return node, f"`headers.{name}`"
    return None


def is_in_the_clear(url: str) -> bool:
    """Return whether requests to a URL are sent unencrypted to another machine. False if it is unresolved."""
    parts = url_parts(url)
    return parts.scheme == "http" and not _is_this_machine(parts.hostname or "")


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def credential_of(read: ParsedMapping) -> str | None:
    """Return where in its requests a destination has a credential; None if it doesn't seem to have one."""
    if "auth" in read.values:
        return "`auth`"
    own = read.node.child("headers")
    written = {name: node.value for name, node in own.value.items()} if own else {}
    for name in read.values.get("headers", ()):  # headers from `defaults` have only a value
        if _CREDENTIAL.search(name) or "${" in written.get(name, "").replace("$${", ""):
            return f"`headers.{name}`"
    for name, _ in parse_qsl(url_parts(read.values["url"]).query):
        if _CREDENTIAL.search(name):
            return f"`{name}` in its query"
    return None
