"""The root file's `policy:` restricts what included files may do, and requires keys of them."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from gateway.rules.addresses import literal_host
from gateway.rules.build import path_of, shown_path_of
from gateway.rules.defaults import contact_of
from gateway.rules.references import literal_beginning
from gateway.rules.schema_reader import NameRef, ParsedMapping, SchemaReader
from gateway.rules.yaml_document import Node
from gateway.verify.verifier import Verifier

REQUIRED = ("owner", "runbook")
FORBIDDEN = ("unverified", "headers", "secrets")
_MAGIC = re.compile(r"[*?\[]")


def check_policy(
    policy: ParsedMapping,
    included: list[ParsedMapping],
    verifiers: Mapping[str, Verifier | None],
    reader: SchemaReader,
) -> None:
    """Report where included files violate the policy.

    `verifiers` are the sources' verifiers by name. Values that can't be resolved here are judged by their known parts.
    """
    by = _Policy(policy.values, reader, policy.node.file)
    for file in included:
        if (own := file.node.child("defaults")) is not None:
            by.check_headers(ParsedMapping(own, {}))
        for name, source in file.values.get("sources", {}).items():
            by.check_source(name, source, verifiers.get(name))
            by.check_contact(source, file)
        destinations = [*file.values.get("destinations", {}).values(), *_inline(file)]
        for destination in destinations:
            by.check_destination(destination)
            by.check_contact(destination, file)
        for route in file.values.get("routes", ()):
            by.check_contact(route, file)
            if request := route.values.get("request"):
                by.check_headers(request)


def confines_secrets(root: ParsedMapping) -> bool:
    """Return whether only a file's own expressions may use its secrets."""
    policy = root.values.get("policy")
    return policy is not None and "secrets" in policy.values.get("forbid", ())


def _inline(file: ParsedMapping) -> Iterator[ParsedMapping]:
    for route in file.values.get("routes", ()):
        yield from [each for each in route.values.get("to", ()) if not isinstance(each, NameRef)]


class _Policy:
    def __init__(self, values: dict[str, Any], reader: SchemaReader, file: str) -> None:
        self._values = values
        self._reader = reader
        self._file = file

    def check_source(self, name: str, read: ParsedMapping, verifier: Verifier | None) -> None:
        if "unverified" in self._values.get("forbid", ()) and verifier is not None and verifier.is_open:
            self._report(read.node.value["verify"], "a scheme that verifies, got none")
        path, node = path_of(name, read), read.node.child("path")
        paths = self._values.get("paths")
        judge = _may_be_one if node in self._reader.unresolved else _is_one
        if paths is not None and not judge(path, paths):
            self._report(node or read.node, f"a path such as {' or '.join(paths)}, got {shown_path_of(name, read)}")

    def check_destination(self, read: ParsedMapping) -> None:
        self.check_headers(read)
        self._check_host(read, "url")
        if proxy := read.values.get("proxy"):
            self._check_host_of(read.node.value["proxy"], proxy.host)
        oauth2 = auth.values.get("oauth2") if (auth := read.values.get("auth")) else None
        if oauth2:
            self._check_host(oauth2, "token_url")
        limit, rate, node = self._values.get("max_rate"), read.values.get("rate"), read.node.child("rate")
        is_known = node is None or (rate is not None and node not in self._reader.unresolved)
        if limit is not None and is_known and (rate is None or rate > limit):
            written = None if node is None else node.value
            got = "none" if rate is None else written if isinstance(written, str) else f"{rate:g}/s"
            self._report(node or read.node, f"a rate of at most {limit:g}/s, got {got}")

    def check_headers(self, read: ParsedMapping) -> None:
        headers = read.node.child("headers")
        if headers is not None and "headers" in self._values.get("forbid", ()):
            self._report(headers, "no headers, got some")

    def check_contact(self, read: ParsedMapping, file: ParsedMapping) -> None:
        contact = contact_of(read, file)
        for key in self._values.get("require", ()):
            if not getattr(contact, key):
                self._report(read.node, f"`{key}`, here or in the file, got none")

    def _check_host(self, read: ParsedMapping, key: str) -> None:
        node = read.node.child(key)
        if node is None or key not in read.values:
            return
        # A resolved value contains no references, whatever it looks like.
        written = read.values[key]
        host = literal_host(written) if node in self._reader.unresolved else urlsplit(written).hostname or ""
        if host is not None:
            self._check_host_of(node, host)

    def _check_host_of(self, node: Node, host: str) -> None:
        hosts = self._values.get("hosts")
        if hosts is not None and not _is_one(host.lower(), tuple([each.lower() for each in hosts])):
            self._report(node, f"a host such as {' or '.join(hosts)}, got another")

    def _report(self, node: Node, expected: str) -> None:
        self._reader.report(node, "policy", f"expected {expected}: the policy of {self._file}")


def _is_one(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def _may_be_one(written: str, patterns: tuple[str, ...]) -> bool:
    """Return whether `_is_one` could be true for a text with unresolved references."""
    begins = literal_beginning(written)
    for pattern in patterns:
        magic = _MAGIC.search(pattern)
        literal = pattern[: magic.start()] if magic else pattern
        if literal.startswith(begins) or (magic and begins.startswith(literal)):
            return True
    return False
