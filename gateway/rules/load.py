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
from gateway.rules.schema_reader import NameRef, ParsedMapping, SchemaReader, free_gradually
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

_RESERVED_HEADERS = (
    ("sign", SIGNATURE_HEADER_PREFIX, f"{SIGNATURE_HEADER_PREFIX}…"),
    ("auth", "authorization", "Authorization"),
)
"""Keys of a destination, with the headers that they set: their prefix, and how they are shown."""
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

    References (`${…}`) are resolved in `environ` (None: this process's). With `resolve=False`, an unresolvable one is a
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
    """Return the providers that a rule file and its includes define, and the errors of those that are invalid.

    Nothing else in the files matters. References are resolved as in `check_rules`.
    """
    reader = SchemaReader(os.environ if environ is None else environ, is_strict=False)
    with gc_paused():
        assembly = _Assembly(reader, RuleFiles(reader).read(path))
        for file in assembly.files:
            assembly.collect_providers(file)
        free_gradually(assembly.files)
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
    with gc_paused():
        files = RuleFiles(reader)
        assembly = _Assembly(reader, files.read(path))
        rules = assembly.build(time.time() if now is None else now)
        rules = None if rules is None else replace(rules, version=files.version)
        if lints and rules is not None:
            Lints(reader, assembly.destinations, assembly.routes).report()
        free_gradually(assembly.files)
    return rules, sorted(set(reader.problems)), reader.files


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the garbage collector, which finds nothing in a growing tree, and takes more than half of the time.

    Afterwards what exists is exempted from it (`gc.freeze`): what is read stays, and has no cycles.
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
        self.declared: dict[str, set[str]] = {"source": set(), "destination": set()}
        """All names, including those of sources and destinations with problems."""
        self.providers: dict[str, Preset] = {}
        self.invalid_providers: set[str] = set()
        """The names of providers with a problem."""
        self.sources: dict[str, ParsedMapping] = {}
        self.destinations: dict[str, ParsedMapping] = {}
        self.routes: dict[str, ParsedMapping] = {}
        self.locations: dict[tuple[str, str], tuple[Node, str]] = {}
        self.egress = Egress()
        self.trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
        self.certificate_header: CertificateHeader | None = None
        self.tls: dict[str, Tls] = {}

    def build(self, now: float) -> Rules | None:
        """Return the rules; None if something is wrong or missing, with the problems in the reader."""
        for file in self.files:
            self._collect(file)
            self._apply_defaults(file)
        for route in self._declared_routes():
            give_way()
            choose_destinations(route, self.declared["destination"], self.reader)
        self._check_paths()
        verifiers = {name: self._verifier(name, parsed) for name, parsed in self.sources.items()}
        client_certificates = {name: self._client_certificates(parsed) for name, parsed in self.sources.items()}
        for file in self.files:
            for route in file.values.get("routes", ()):
                self._check_names(route)
        self._check_reserved_headers()
        for name, parsed in self.sources.items():
            self._check_after_delivery(name, parsed, verifiers[name])
        for route in self.routes.values():
            give_way()
            check_order(route, self.sources, self.reader)
            check_request(route, self.reader)
            check_split(route, self.reader)
        for name, parsed in self.destinations.items():
            self._check_transport(name, parsed)
        if policy := self.files[0].values.get("policy") if self.files else None:
            check_policy(policy, list(self.files[1:]), verifiers, self.reader)
        if self.reader.has_errors or self.reader.is_incomplete:
            return None
        Advice(self.reader, self.sources, self.destinations, self.routes).report(verifiers, now)
        routes = {name: route_of(name, parsed) for name, parsed in self.routes.items()}
        self._warn_of_unused_secrets(routes.values())
        rules = Rules(
            sources={
                name: source_of(name, parsed, verifier, client_certificates[name], self.certificate_header)
                for name, parsed in self.sources.items()
                if (verifier := verifiers[name])
            },
            destinations={
                name: destination_of(name, parsed, self.tls.get(name)) for name, parsed in self.destinations.items()
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
                message = f"no request computes a digest with {secret.name!r}"
                self.reader.report(node, "unused", message, severity="warning", at_key=True)

    def _collect(self, file: ParsedMapping) -> None:
        for kind, names in self.declared.items():
            section = file.node.child(f"{kind}s")
            if section and isinstance(section.value, dict):
                names.update(section.value)
        self.collect_providers(file)
        for name, parsed in file.values.get("sources", {}).items():
            self._add("source", self.sources, name, parsed, parsed.node, at_key=True)
        for name, parsed in file.values.get("destinations", {}).items():
            self._add("destination", self.destinations, name, parsed, parsed.node, at_key=True)
        for parsed in file.values.get("routes", ()):
            self._add_named("route", self.routes, parsed)
            for destination in parsed.values.get("to", ()):
                if isinstance(destination, ParsedMapping):
                    self._add_named("destination", self.destinations, destination)
        if egress := file.values.get("egress"):
            self.egress = Egress(
                is_private_allowed=egress.values.get("private", "allow") == "allow",
                allow=egress.values.get("allow", ()),
            )
        if ingress := file.values.get("ingress"):
            self._collect_ingress(ingress)

    def _apply_defaults(self, file: ParsedMapping) -> None:
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

    def _collect_ingress(self, parsed: ParsedMapping) -> None:
        self.trusted_proxies = parsed.values.get("trusted_proxies", ())
        for network, node in zip(self.trusted_proxies, _items(parsed.node.child("trusted_proxies")), strict=False):
            if not network.prefixlen:
                message = "expected the networks of proxies, got every address: any client could spoof its address"
                self.reader.report(node, "weak", message, severity="warning")
        if header := parsed.values.get("certificate_header"):
            if header.values.keys() >= {"name", "format"}:
                self.certificate_header = CertificateHeader(**header.values)
            if not self.trusted_proxies:
                message = "`certificate_header` needs `trusted_proxies`, got none: the header is ignored"
                self.reader.report(header.node, "unused", message, severity="warning", at_key=True)

    def collect_providers(self, file: ParsedMapping) -> None:
        declared = file.node.child("providers")
        if declared is not None and isinstance(declared.value, dict):
            self.invalid_providers |= declared.value.keys() - file.values.get("providers", {}).keys()
        for name, preset in file.values.get("providers", {}).items():
            node = file.node.value["providers"].value[name]
            if name in PRESETS or name in GENERIC:
                self.reader.report(
                    node, "duplicate", f"expected a name that no built-in scheme has, got {name!r}", at_key=True
                )
            self._claim("provider", name, f"provider {name!r}", node, at_key=True)
            self.providers[name] = preset

    def _add_named(self, kind: str, into: dict[str, ParsedMapping], parsed: ParsedMapping) -> None:
        if name := parsed.values.get("name"):
            self._add(kind, into, name, parsed, parsed.node.value["name"])
        else:
            self.reader.is_incomplete = True

    def _add(
        self,
        kind: str,
        into: dict[str, ParsedMapping],
        name: str,
        parsed: ParsedMapping,
        node: Node,
        *,
        at_key: bool = False,
    ) -> None:
        self._claim(kind, name, f"{kind} {name!r}", node, at_key=at_key)
        if kind in self.declared:
            self.declared[kind].add(name)
        into.setdefault(name, parsed)

    def _claim(self, kind: str, name: str, shown: str, node: Node, *, at_key: bool = False) -> None:
        """Register a name or path for a node. Report it if another node has it already."""
        give_way()
        line, column = node.key_location if at_key else (node.line, node.column)
        first = self.locations.setdefault((kind, name), (node, f"{node.file}:{line}:{column}"))
        if first[0] is not node:
            message = f"duplicate {shown}, first defined at {first[1]}"
            if (
                first[1] == f"{node.file}:{line}:{column}" and first[0].path != node.path
            ):  # `foreach` repeats the location, too
                message = f"duplicate {shown}: an alias (*) repeats it from {first[0].path}, expected another name"
            self.reader.report(node, "duplicate", message, at_key=at_key)

    def _check_paths(self) -> None:
        for name, parsed in self.sources.items():
            shown = f"source at {shown_path_of(name, parsed)}"
            self._claim("path", path_of(name, parsed), shown, parsed.node.child("path") or parsed.node)

    def _verifier(self, name: str, parsed: ParsedMapping) -> Verifier | None:
        config = parsed.values.get("verify")
        if config is None:
            self.reader.is_incomplete = True
            return None
        node = parsed.node.value["verify"]
        try:
            verifier = build_verifier(config, public_url=parsed.values.get("public_url"), providers=self.providers)
        except SchemeError as error:
            scheme = config.get("scheme")
            if not (isinstance(scheme, str) and scheme in self.invalid_providers):  # its problem has been reported
                self.reader.locate(node, error.problems)
            paths = [path for path, _ in error.problems]
            if not isinstance(error, PartialSchemeError) or not self.reader.are_unresolved(node, paths):
                self.reader.is_incomplete = True
                return None
            verifier = error.verifier
        if verifier.is_open and "client_certificate" not in parsed.values:
            message = (
                f"expected a scheme that verifies, got none: anybody who reaches {shown_path_of(name, parsed)} can send"
            )
            self.reader.report(node, "unverified", message, severity="warning")
        if parsed.values.get("quarantine") and (problem := why_not_kept(verifier)):
            message = f"quarantine: expected a scheme whose requests can be verified again, got {problem}"
            self.reader.report(parsed.node.value["quarantine"], "value", message)
        return verifier

    def _client_certificates(self, parsed: ParsedMapping) -> ClientCertificates | None:
        found: ParsedMapping | None = parsed.values.get("client_certificate")
        if found is None:
            return None
        authorities: tuple[bytes, ...] = ()
        if (text := found.values.get("ca")) is not None:
            try:
                authorities = read_authorities(text)
            except ValueError as error:
                self.reader.report(found.node.value["ca"], "value", str(error))
        return client_certificates_of(found, authorities)

    def _check_names(self, route: ParsedMapping) -> None:
        give_way()
        for key, kind in (("from", "source"), ("to", "destination")):
            known = self.declared[kind]
            uses = route.values.get(key, ())
            if not uses or any(node in self.reader.unresolved for node in _items(route.node.child(key))):
                self.reader.is_incomplete = True
            seen: set[str] = set()
            for ref in uses:
                if not isinstance(ref, NameRef):
                    continue
                if ref.name in seen:
                    self.reader.report(ref.node, "duplicate", f"expected each {kind} once, got {ref.name!r} again")
                elif ref.name not in known and not self.reader.has_gaps:
                    # Searching 10,000 names takes a while.
                    guess = did_you_mean(ref.name, known) if len(self.reader.problems) < MAX_GUESSES else ""
                    guess = ": several are written as a list, [a, b]" if "," in ref.name else guess
                    shown = "whose name is a URL" if "://" in ref.name else repr(ref.name)  # which may have a secret
                    self.reader.report(ref.node, "unknown_name", f"unknown {kind} {shown}{guess}")
                seen.add(ref.name)

    def _check_after_delivery(self, name: str, parsed: ParsedMapping, verifier: Verifier | None) -> None:
        """Refuse a destination to which no route sends this source's events; and any, if requests are split."""
        respond = parsed.values.get("respond")
        after = None if respond is None else respond.values.get("after_delivery")
        ref = None if after is None else after.values.get("destination")
        if after is None or ref is None:
            return
        if split_of(parsed.values.get("split"), None if verifier is None else verifier.split) is not None:
            message = "expected `split: off` with `after_delivery`, got requests with several events"
            self.reader.report(after.node, "value", message, at_key=True)
        known = self.declared["destination"]
        if ref.name not in known:
            if not self.reader.has_gaps:
                self.reader.report(
                    ref.node,
                    "unknown_name",
                    f"unknown destination {ref.name!r}{did_you_mean(ref.name, known)}",
                )
        elif not (routes := [each for each in self._declared_routes() if _delivers(each, name, ref.name)]):
            message = f"expected a destination of a route from {name!r}, got {ref.name!r}"
            self.reader.report(ref.node, "value", message)
        elif all({"delay", "debounce", "split"} & route.values.keys() for route in routes):
            message = (
                "expected a destination of a route without `delay`, `debounce` and `split`, got one whose response"
            )
            self.reader.report(ref.node, "value", f"{message} comes late, or one for each item")

    def _declared_routes(self) -> Iterable[ParsedMapping]:
        return (route for file in self.files for route in file.values.get("routes", ()))

    def _check_reserved_headers(self) -> None:
        """Refuse headers that `sign` or `auth` replaces: a destination's own, and those of the routes to it."""
        for key, prefix, shown in _RESERVED_HEADERS:
            with_key = {name: parsed for name, parsed in self.destinations.items() if key in parsed.values}
            requests_to_them = [
                request
                for route in self.routes.values()
                if (request := route.values.get("request")) and not with_key.keys().isdisjoint(names_of(route, "to"))
            ]
            for parsed in (*with_key.values(), *requests_to_them):
                for name in parsed.values.get("headers", ()):
                    if name.lower().startswith(prefix):
                        message = f"expected no {shown} where a destination has `{key}`, got {name!r}"
                        own = parsed.node.child("headers")
                        if where := own and own.child(name):
                            self.reader.report(where, "value", message, at_key=True)
                        else:
                            self.reader.report(parsed.node, "value", f"{message} in `defaults`", at_key=True)

    def _check_transport(self, name: str, parsed: ParsedMapping) -> None:
        """Check the keys of a destination's headers, proxy and TLS, and build its TLS context."""
        node = parsed.node
        if node.child("proxy_auth") and not node.child("proxy"):
            self.reader.report(node.value["proxy_auth"], "value", "`proxy_auth` needs a `proxy`, got none", at_key=True)
        forwarded = set(map(cgi_normalized, parsed.values.get("forward_headers", ())))
        dropped = node.child("drop_headers")
        for item in dropped.value if dropped and isinstance(dropped.value, list) else ():
            if isinstance(item.value, str) and cgi_normalized(item.value) in forwarded:
                message = f"expected a header that isn't among `forward_headers`, got {item.value!r}"
                self.reader.report(item, "value", message)
        tls = parsed.values.get("tls")
        if tls is None:
            return
        if parsed.values.get("url", "https:").startswith("http:"):
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
