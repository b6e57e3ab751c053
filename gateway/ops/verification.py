"""How a source is verified, as its rule file says: the origin of each secret, never its value."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.model import UsageError
from gateway.ops.rule_documents import rule_documents
from gateway.rules.load import InvalidRulesError, check_rules
from gateway.rules.rules import Rules, Source
from gateway.rules.yaml_document import Node, Problem
from gateway.text import MASK, did_you_mean
from gateway.verify.check import SigningSpec
from gateway.verify.key_ring import SecretLifetime

_REFERENCE = re.compile(r"\$\$\{|\$\{(?!\{)[^}]*\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """`secrets` are the references of each, with `***` for literal text; `location` is where `verify` is.

    `public_keys` are the same, and `lifetimes` those of both, in this order.
    """

    scheme: str
    signing_methods: Sequence[SigningSpec]
    secrets: Sequence[str]
    public_keys: Sequence[str]
    lifetimes: Sequence[SecretLifetime]
    location: str


def verification_of(files: Sequence[Path], source: Source) -> Verification:
    """Return how a source in these rule files is verified."""
    verify = None
    if (node := written_source(files, source.name)) is not None:
        verify = node.child("verify")
    return Verification(
        scheme=source.verifier.scheme,
        signing_methods=source.verifier.signing_specs,
        secrets=_masked(verify, "secrets"),
        public_keys=_masked(verify, "public_keys"),
        lifetimes=source.verifier.lifetimes,
        location="" if verify is None else f"{verify.file}:{verify.line}",
    )


def _masked(verify: Node | None, key: str) -> Sequence[str]:
    written = None if verify is None else verify.child(key)
    items = written.value if written is not None and isinstance(written.value, list) else []
    return [masked_secret((item.child("secret") or item).value) for item in items]


def written_source(files: Sequence[Path], name: str) -> Node | None:
    """Return the YAML node of a source, if one of these files is a rule file and has it."""
    for _, root in rule_documents(files):
        node: Node | None = root
        for step in ("sources", name):
            node = node.child(step) if node else None
        if node is not None:
            return node
    return None


def masked_secret(written: object) -> str:
    """Return the references of a secret, such as `${file:secrets/shop}`, and `***` for everything else."""
    text, masked, end = str(written), "", 0
    for found in _REFERENCE.finditer(text):
        if found[0] == "$${":
            continue
        masked += MASK if found.start() > end else ""
        name, has_default, _ = found[0][2:-1].partition(":-")
        masked += f"${{{name}:-{MASK}}}" if has_default and not name.startswith("file:") else found[0]
        end = found.end()
    return masked + (MASK if end < len(text) or not masked else "")


def defaults_used(files: Sequence[Path], name: str, environ: Mapping[str, str]) -> Sequence[Problem]:
    """Return the references of a source's verification for which their default counts here.

    The gateway's environment may have others. What such a default verifies, it may have refused with good reason: the
    default is in the rules for all to read.
    """
    problems: list[Problem] = []
    written = written_source(files, name)
    keys = ("verify", "allow_from", "client_certificate")
    nodes = [] if written is None else [node for key in keys if (node := written.child(key)) is not None]
    while nodes:
        node = nodes.pop()
        value = node.value
        nodes += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for found in _REFERENCE.finditer(value) if isinstance(value, str) else ():
            variable, has_default, _ = found[0][2:-1].partition(":-")
            if has_default and not variable.startswith("file:") and not environ.get(variable):
                message = f"the environment variable {variable} isn't set: expected it as the gateway has it"
                problems.append(node.problem("unresolved", message))
    return problems


def resolved_source(rules: Path, name: str) -> tuple[Rules, Source, Sequence[Problem]]:
    """Return rules, one of their sources, and which of its references can't be resolved here.

    Those of other sources don't matter. Raises RulesError, and UsageError for an unknown source.
    """
    found, problems = check_rules(rules, resolve=False)
    if found is None:
        raise InvalidRulesError(problems)
    source = found.sources.get(name)
    if source is None:
        raise UsageError(f"{rules}: unknown source {name!r}{did_you_mean(name, found.sources)}")
    prefix = f"sources.{name}."
    return found, source, [each for each in problems if each.code == "unresolved" and each.path.startswith(prefix)]
