"""Loads routes.yaml and the files that it includes as `Rules`, or reports every problem with its location."""

import gc
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.model import RulesError
from gateway.rules.advice import Advice
from gateway.rules.build import (
    choose_destinations,
    client_certificates_of,
    destination_of,
    names_of,
    path_of,
    route_of,
    shown_path_of,
    source_of,
    split_of,
)
from gateway.rules.defaults import contacts_of, fill_destination, fill_route
from gateway.rules.destination_credentials import TlsError, tls_of
from gateway.rules.file_stamps import Stamps
from gateway.rules.lints import Lints
from gateway.rules.policy import check_policy
from gateway.rules.route_checks import check_order, check_request, check_split
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rule_files import RuleFiles
from gateway.rules.rules import (
    SIGNATURE_HEADER_PREFIX,
    CertificateHeader,
    Egress,
    Route,
    Rules,
    Tls,
    cgi_normalized,
)
from gateway.rules.schema_reader import NameRef, ParsedMapping, SchemaReader, take_all_apart
from gateway.rules.yaml_document import Node, Problem
from gateway.text import did_you_mean
from gateway.turns import give_way
from gateway.verify.client_certificates import ClientCertificates, read_authorities
from gateway.verify.config_keys import GENERIC
from gateway.verify.kept_proof import why_not_kept
from gateway.verify.presets import PRESETS, Preset, SchemeError
from gateway.verify.schemes import PartialSchemeError, build_verifier
from gateway.verify.verifier import Verifier

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

_REPLACED = (
    ("sign", SIGNATURE_HEADER_PREFIX, f"{SIGNATURE_HEADER_PREFIX}…"),
    ("auth", "authorization", "Authorization"),
)
"""Keys of a destination, with the headers that they replace: their prefix, and how they are shown."""
MAX_GUESSES = 50  # With more problems than this, spellings aren't guessed.


class InvalidRulesError(RulesError):
    """The rule files have problems: all of them, by file and location; warnings only if there are no errors."""

    def __init__(self, problems: Sequence[Problem], stamps: Stamps | None = None) -> None:
        self.stamps = stamps or {}
        """The stamps of the files that were read or missing. A change of any of them may fix the rules."""
        self.problems = tuple([problem for problem in problems if problem.severity == "error"] or problems)
        super().__init__("\n".join(map(str, self.problems)))


def load_rules(
    path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    resolve: bool = True,
    now: float | None = None,
    reads_secrets: bool = True,
) -> Rules:
    """Read a rule file, or raise InvalidRulesError with every problem in it and in the files that it includes.

    References are resolved in `environ` (None: this process's). With `resolve=False`, an unresolvable reference is a
    warning, and a placeholder replaces its value; without `reads_secrets`, each `${file:…}` is unresolvable. `now` is
    for warnings about secrets that expire (None: the machine's clock).
    Reads files and may take seconds, so don't call it on the event loop.
    """
    rules, problems, stamps = _read(path, environ, resolve=resolve, now=now, reads_secrets=reads_secrets)
    if rules is None:
        raise InvalidRulesError(problems, stamps)
    return rules


def check_rules(
    path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    resolve: bool = False,
    now: float | None = None,
    lints: bool = False,
) -> tuple[Rules | None, list[Problem]]:
    """Return the rules as `load_rules` does, and all problems, warnings included, by file and location.

    With `lints` they include warnings about valid rules that could be better.

    No rules are returned if there is an error, or if something essential (such as a route's name) is an unresolved
    reference.
    """
    rules, problems, _ = _read(path, environ, resolve=resolve, now=now, lints=lints)
    return rules, problems


def check_providers(
    path: Path, *, environ: Mapping[str, str] | None = None
) -> tuple[Mapping[str, Preset], list[Problem]]:
    """Return the providers that a rule file and its includes define, and the problems with others.

    Nothing else in the files matters. References are resolved as in `check_rules`.
    """
    reader = SchemaReader(os.environ if environ is None else environ, is_strict=False)
    with no_collection():
        assembly = _Assembly(reader, RuleFiles(reader).read(path))
        for file in assembly.files:
            assembly.collect_providers(file)
        take_all_apart(assembly.files)
    about = [each for each in reader.problems if re.split(r"[.\[]", each.path)[0] in {"", "include", "providers"}]
    return assembly.providers, sorted({each for each in about if each.severity == "error"})


def _read(
    path: Path,
    environ: Mapping[str, str] | None,
    *,
    resolve: bool,
    now: float | None,
    reads_secrets: bool = True,
    lints: bool = False,
) -> tuple[Rules | None, list[Problem], Stamps]:
    reader = SchemaReader(os.environ if environ is None else environ, is_strict=resolve, reads_secrets=reads_secrets)
    with no_collection():
        files = RuleFiles(reader)
        assembly = _Assembly(reader, files.read(path))
        rules = assembly.rules(time.time() if now is None else now)
        rules = None if rules is None else replace(rules, version=files.version)
        if lints and rules is not None:
            Lints(reader, assembly.destinations, assembly.routes).give()
        take_all_apart(assembly.files)
    return rules, sorted(set(reader.problems)), reader.files


@contextmanager
def no_collection() -> Iterator[None]:
    """Disable the garbage collector: in a growing tree it finds no garbage, and takes more than half of the time.

    The objects that exist then are never traversed: what is read stays, and has no cycles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Assembly:
    """Combines the files: checks that names are unique and known, then builds the objects."""

    def __init__(self, reader: SchemaReader, files: Sequence[ParsedMapping]) -> None:
        self.reader = reader
        self.files = files
        self.written: dict[str, set[str]] = {"source": set(), "destination": set()}
        """All names, including those of sources and destinations with problems."""
        self.providers: dict[str, Preset] = {}
        self.written_providers: set[str] = set()
        """The names of providers with a problem."""
        self.sources: dict[str, ParsedMapping] = {}
        self.destinations: dict[str, ParsedMapping] = {}
        self.routes: dict[str, ParsedMapping] = {}
        self.locations: dict[tuple[str, str], tuple[Node, str]] = {}
        self.egress = Egress()
        self.trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
        self.certificate_header: CertificateHeader | None = None
        self.tls: dict[str, Tls] = {}

    def rules(self, now: float) -> Rules | None:
        """Return the rules; None if something is wrong or missing, with the problems in the reader."""
        for file in self.files:
            self._collect(file)
            self._fill(file)
        for route in self._routes():
            give_way()
            choose_destinations(route, self.written["destination"], self.reader)
        self._check_paths()
        verifiers = {name: self._verifier(name, read) for name, read in self.sources.items()}
        demanded = {name: self._client_certificates(read) for name, read in self.sources.items()}
        for file in self.files:
            for route in file.values.get("routes", ()):
                self._check_references(route)
        self._check_replaced()
        for name, read in self.sources.items():
            self._check_after_delivery(name, read, verifiers[name])
        for route in self.routes.values():
            give_way()
            check_order(route, self.sources, self.reader)
            check_request(route, self.reader)
            check_split(route, self.reader)
        for name, read in self.destinations.items():
            self._check_transport(name, read)
        if policy := self.files[0].values.get("policy") if self.files else None:
            check_policy(policy, list(self.files[1:]), verifiers, self.reader)
        if self.reader.has_errors or self.reader.is_incomplete:
            return None
        Advice(self.reader, self.sources, self.destinations, self.routes).give(verifiers, now)
        routes = {name: route_of(name, read) for name, read in self.routes.items()}
        self._warn_of_unused_secrets(routes.values())
        rules = Rules(
            sources={
                name: source_of(name, read, verifier, demanded[name], self.certificate_header)
                for name, read in self.sources.items()
                if (verifier := verifiers[name])
            },
            destinations={
                name: destination_of(name, read, self.tls.get(name)) for name, read in self.destinations.items()
            },
            routes=routes,
            egress=self.egress,
            trusted_proxies=self.trusted_proxies,
            certificate_header=self.certificate_header,
            table=RouteTable(routes.values()),
            files=tuple(self.reader.files),
            stamps=self.reader.files,
            contacts=contacts_of(self.files),
            warnings=tuple(map(str, sorted(self.reader.problems))),
            secret_values=frozenset(self.reader.secret_values),
        )
        return replace(rules, routing_revision=routing_revision(rules))

    def _warn_of_unused_secrets(self, routes: Iterable[Route]) -> None:
        if not self.reader.named_secrets:
            return
        requests = [route.request for route in routes if route.request is not None]
        used = {id(secret) for request in requests for each in request.expressions for secret in each.secrets}
        for secret, node in self.reader.named_secrets:
            if id(secret) not in used:
                message = f"no request makes a digest by {secret.name!r}"
                self.reader.report(node, "unused", message, severity="warning", at_key=True)

    def _collect(self, file: ParsedMapping) -> None:
        for what, names in self.written.items():
            section = file.node.child(f"{what}s")
            if section and isinstance(section.value, dict):
                names.update(section.value)
        self.collect_providers(file)
        for name, read in file.values.get("sources", {}).items():
            self._add("source", self.sources, name, read, read.node, at_key=True)
        for name, read in file.values.get("destinations", {}).items():
            self._add("destination", self.destinations, name, read, read.node, at_key=True)
        for read in file.values.get("routes", ()):
            self._add_named("route", self.routes, read)
            for destination in read.values.get("to", ()):
                if isinstance(destination, ParsedMapping):
                    self._add_named("destination", self.destinations, destination)
        if egress := file.values.get("egress"):
            self.egress = Egress(
                is_private_allowed=egress.values.get("private", "allow") == "allow",
                allow=egress.values.get("allow", ()),
            )
        if ingress := file.values.get("ingress"):
            self._collect_ingress(ingress)

    def _fill(self, file: ParsedMapping) -> None:
        """Complete a file's routes and destinations from its defaults."""
        defaults = file.values["defaults"]
        if defaults is None:
            return
        for destination in file.values.get("destinations", {}).values():
            fill_destination(destination, defaults)
        for route in file.values.get("routes", ()):
            fill_route(route, defaults)
            for destination in route.values.get("to", ()):
                if isinstance(destination, ParsedMapping):
                    fill_destination(destination, defaults)

    def _collect_ingress(self, read: ParsedMapping) -> None:
        self.trusted_proxies = read.values.get("trusted_proxies", ())
        for network, node in zip(self.trusted_proxies, _items(read.node.child("trusted_proxies")), strict=False):
            if not network.prefixlen:
                message = "expected the networks of proxies, got every address: any client may say where it is"
                self.reader.report(node, "weak", message, severity="warning")
        if header := read.values.get("certificate_header"):
            if header.values.keys() >= {"name", "format"}:
                self.certificate_header = CertificateHeader(**header.values)
            if not self.trusted_proxies:
                message = "expected `trusted_proxies` with it, got none: the header counts from nobody"
                self.reader.report(header.node, "unused", message, severity="warning", at_key=True)

    def collect_providers(self, file: ParsedMapping) -> None:
        written = file.node.child("providers")
        if written is not None and isinstance(written.value, dict):
            self.written_providers |= written.value.keys() - file.values.get("providers", {}).keys()
        for name, preset in file.values.get("providers", {}).items():
            node = file.node.value["providers"].value[name]
            if name in PRESETS or name in GENERIC:
                self.reader.report(node, "duplicate", f"expected a new scheme's name, got {name!r}", at_key=True)
            self._claim("provider", name, f"provider {name!r}", node, at_key=True)
            self.providers[name] = preset

    def _add_named(self, what: str, into: dict[str, ParsedMapping], read: ParsedMapping) -> None:
        if name := read.values.get("name"):
            self._add(what, into, name, read, read.node.value["name"])
        else:
            self.reader.is_incomplete = True

    def _add(
        self,
        what: str,
        into: dict[str, ParsedMapping],
        name: str,
        read: ParsedMapping,
        node: Node,
        *,
        at_key: bool = False,
    ) -> None:
        self._claim(what, name, f"{what} {name!r}", node, at_key=at_key)
        if what in self.written:
            self.written[what].add(name)
        into.setdefault(name, read)

    def _claim(self, what: str, name: str, shown: str, node: Node, *, at_key: bool = False) -> None:
        """Register a name or path for a node. Report it if another node has it already."""
        give_way()
        line, column = node.key_location if at_key else (node.line, node.column)
        first = self.locations.setdefault((what, name), (node, f"{node.file}:{line}:{column}"))
        if first[0] is not node:
            message = f"duplicate {shown}, first defined at {first[1]}"
            if first[1] == f"{node.file}:{line}:{column}" and first[0].path != node.path:  # else `foreach` does
                message = f"duplicate {shown}: an alias (*) repeats it from {first[0].path}, expected another"
            self.reader.report(node, "duplicate", message, at_key=at_key)

    def _check_paths(self) -> None:
        for name, read in self.sources.items():
            shown = f"source at {shown_path_of(name, read)}"
            self._claim("path", path_of(name, read), shown, read.node.child("path") or read.node)

    def _verifier(self, name: str, read: ParsedMapping) -> Verifier | None:
        config = read.values.get("verify")
        if config is None:
            self.reader.is_incomplete = True
            return None
        node = read.node.value["verify"]
        try:
            verifier = build_verifier(config, public_url=read.values.get("public_url"), providers=self.providers)
        except SchemeError as error:
            scheme = config.get("scheme")
            if not (isinstance(scheme, str) and scheme in self.written_providers):  # its problem has been reported
                self.reader.locate(node, error.problems)
            places = [path for path, _ in error.problems]
            if not isinstance(error, PartialSchemeError) or not self.reader.are_unresolved(node, places):
                self.reader.is_incomplete = True
                return None
            verifier = error.verifier
        if verifier.is_open and "client_certificate" not in read.values:
            message = (
                f"expected a scheme that verifies, got none: anybody who reaches {shown_path_of(name, read)} can send"
            )
            self.reader.report(node, "unverified", message, severity="warning")
        if read.values.get("quarantine") and (problem := why_not_kept(verifier)):
            message = f"quarantine: expected a scheme whose requests can be verified again, got {problem}"
            self.reader.report(read.node.value["quarantine"], "value", message)
        return verifier

    def _client_certificates(self, read: ParsedMapping) -> ClientCertificates | None:
        found: ParsedMapping | None = read.values.get("client_certificate")
        if found is None:
            return None
        authorities: tuple[bytes, ...] = ()
        if (text := found.values.get("ca")) is not None:
            try:
                authorities = read_authorities(text)
            except ValueError as error:
                self.reader.report(found.node.value["ca"], "value", str(error))
        return client_certificates_of(found, authorities)

    def _check_references(self, route: ParsedMapping) -> None:
        give_way()
        for key, what in (("from", "source"), ("to", "destination")):
            known = self.written[what]
            uses = route.values.get(key, ())
            if not uses or any(node in self.reader.unresolved for node in _items(route.node.child(key))):
                self.reader.is_incomplete = True
            seen: set[str] = set()
            for use in uses:
                if not isinstance(use, NameRef):
                    continue
                if use.name in seen:
                    self.reader.report(use.node, "duplicate", f"expected each {what} once, got {use.name!r} again")
                elif use.name not in known and not self.reader.has_gaps:
                    # Searching 10,000 names takes a while.
                    guess = did_you_mean(use.name, known) if len(self.reader.problems) < MAX_GUESSES else ""
                    guess = ": several are written as a list, [a, b]" if "," in use.name else guess
                    shown = "whose name is a URL" if "://" in use.name else repr(use.name)  # which may have a secret
                    self.reader.report(use.node, "unknown_name", f"unknown {what} {shown}{guess}")
                seen.add(use.name)

    def _check_after_delivery(self, name: str, read: ParsedMapping, verifier: Verifier | None) -> None:
        """Refuse a destination to which no route sends this source's events, and two answers to several events."""
        respond = read.values.get("respond")
        after = None if respond is None else respond.values.get("after_delivery")
        use = None if after is None else after.values.get("destination")
        if after is None or use is None:
            return
        if split_of(read.values.get("split"), None if verifier is None else verifier.split) is not None:
            message = "expected `split: off` with `after_delivery`, got requests with several events"
            self.reader.report(after.node, "value", message, at_key=True)
        known = self.written["destination"]
        if use.name not in known:
            if not self.reader.has_gaps:
                self.reader.report(
                    use.node, "unknown_name", f"unknown destination {use.name!r}{did_you_mean(use.name, known)}"
                )
        elif not (routes := [each for each in self._routes() if _delivers(each, name, use.name)]):
            message = f"expected a destination of a route from {name!r}, got {use.name!r}"
            self.reader.report(use.node, "value", message)
        elif all({"delay", "debounce", "split"} & route.values.keys() for route in routes):
            message = (
                "expected a destination of a route without `delay`, `debounce` and `split`, got one whose response"
            )
            self.reader.report(use.node, "value", f"{message} comes late, or one for each item")

    def _routes(self) -> Iterable[ParsedMapping]:
        return (route for file in self.files for route in file.values.get("routes", ()))

    def _check_replaced(self) -> None:
        """Refuse headers that `sign` or `auth` replaces: a destination's own, and those of the routes to it."""
        for key, beginning, shown in _REPLACED:
            with_key = {name: read for name, read in self.destinations.items() if key in read.values}
            requests_to_them = [
                request
                for route in self.routes.values()
                if (request := route.values.get("request")) and not with_key.keys().isdisjoint(names_of(route, "to"))
            ]
            for read in (*with_key.values(), *requests_to_them):
                for name in read.values.get("headers", ()):
                    if name.lower().startswith(beginning):
                        message = f"expected no {shown} where a destination has `{key}`, got {name!r}"
                        own = read.node.child("headers")
                        if where := own and own.child(name):
                            self.reader.report(where, "value", message, at_key=True)
                        else:
                            self.reader.report(read.node, "value", f"{message} in `defaults`", at_key=True)

    def _check_transport(self, name: str, read: ParsedMapping) -> None:
        """Check the keys of a destination's headers, proxy and TLS, and build its TLS context."""
        node = read.node
        if node.child("proxy_auth") and not node.child("proxy"):
            self.reader.report(node.value["proxy_auth"], "value", "`proxy_auth` needs a `proxy`, got none", at_key=True)
        forwarded = set(map(cgi_normalized, read.values.get("forward_headers", ())))
        dropped = node.child("drop_headers")
        for item in dropped.value if dropped and isinstance(dropped.value, list) else ():
            if isinstance(item.value, str) and cgi_normalized(item.value) in forwarded:
                message = f"expected a header that isn't among `forward_headers`, got {item.value!r}"
                self.reader.report(item, "value", message)
        tls = read.values.get("tls")
        if tls is None:
            return
        if read.values.get("url", "https:").startswith("http:"):
            self.reader.report(tls.node, "value", "`tls` needs an https URL, got http", at_key=True)
        if not tls.node.value:
            self.reader.report(tls.node, "value", "expected `ca`, or `certificate` and `key`, got neither")
        for key, other in (("certificate", "key"), ("key", "certificate")):
            if tls.node.child(key) and not tls.node.child(other):
                self.reader.report(tls.node, "missing_key", f"expected the key {other!r} with {key!r}, got none")
        try:
            self.tls[name] = tls_of(**{key: tls.values.get(key) for key in ("ca", "certificate", "key")})
        except TlsError as error:
            self.reader.report(tls.node.value[error.key], "value", str(error))


def _delivers(route: ParsedMapping, source: str, destination: str) -> bool:
    return source in names_of(route, "from") and destination in names_of(route, "to")


def _items(node: Node | None) -> Sequence[Node]:
    return node.value if node is not None and isinstance(node.value, list) else ()
