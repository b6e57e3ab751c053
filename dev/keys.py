"""Write docs/keys.md, every key of a rule file, from the schema: `python -m dev.keys`.

The examples are the first ones in the documents and recipes, whose blocks of rules are checked and tested.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, assert_never

import yaml

from gateway.rules.schema import ROOT
from gateway.rules.value_kinds import ByKey, Key, Kind, MappingKind, NameOr, Scalar, Several, Table, Tree, mappings_in
from gateway.rules.yaml_document import Node, parse_document

DOCS = Path(__file__).parent.parent / "docs"
DOCUMENT = DOCS / "keys.md"
HEAD = """# Every key of routes.yaml

<!-- Written by `python -m dev.keys` from gateway/rules/schema.py: change that. -->

[rules.md](rules.md) explains them with whole examples. A path such as `sources.NAME.limits` says where a key is
written; `[]` stands for each item of a list. The keys of `verify` are those of the
[scheme](rules.md#sources-and-verification) or the [provider](providers.md), those of a `request` with a `preset` are in
[request-presets.md](request-presets.md), and those of `tests` in [rules.md](rules.md#tests-of-rules).
"""
MAX_EXAMPLE = 60
EXAMPLES: Mapping[str, str] = {
    "owner": "payments",
    "runbook": "https://wiki.example/webhooks",
    "providers": "{acme: {verify: {header: X-Acme-Signature}}}",
    "secrets": '{pepper: "${PEPPER}"}',
    "policy": "{hosts: ['*.acme.example'], require: [owner]}",
    "defaults.concurrency": "10",
    "defaults.retry.max_attempts": "8",
    "defaults.retry.jitter": "0.1",
    "sources.NAME.topic": "crm.events",
    "sources.NAME.dedupe": "1h",
    "sources.NAME.split": "body.records",
    "sources.NAME.redact": "[body.card.number, headers.x-api-key]",
    "sources.NAME.respond": "{status: 200, body: {ok: true}}",
    "sources.NAME.client_certificate.subjects": "['CN=hooks,O=Bank,C=DE']",
    "sources.NAME.client_certificate.uris": "[spiffe://bank.example/hooks]",
    "sources.NAME.client_certificate.emails": "[hooks@bank.example]",
    "destinations.NAME.forward_headers": "[X-Forwarded-For]",
    "destinations.NAME.drop_headers": "[X-Hub-Signature-256]",
    "destinations.NAME.auth.oauth2.audience": "https://api.erp.example",
    "routes[].delay": "5m",
    "routes[].retry.results": "{404: drop, 5xx: retry}",
    "tests[].event.query": "team=a&dry=1",
    "tests[].event.file": "events/push.json",
    "tests[].event.captured": "events/captured.jsonl",
    "tests[].expect.snapshot": "true",
    "tests[].expect.requests[].item": "0",
}
"""Examples by path or name, of keys of which no document has a short one."""
_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def document() -> str:
    """Return the whole document."""
    examples: dict[int, str] = {}
    for text in _rules():
        root = parse_document("", text, [])
        if root is not None and isinstance(root.value, dict):
            _collect(root, ROOT, examples)
    return "\n".join([HEAD.rstrip("\n"), *_sections(ROOT, "", examples, {})]) + "\n"


def _rules() -> Iterator[str]:
    """Yield the rule files of the documents and the recipes."""
    for file in (DOCS / "rules.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "recipes").glob("*.yaml"))):
        text = file.read_text()
        yield from [text] if file.suffix == ".yaml" else _BLOCK.findall(text)


def _collect(node: Node, kind: Kind, examples: dict[int, str]) -> None:
    """Keep the first example of each key, by its id, of those that are short enough to be shown."""
    found = _mapping_in(kind, "")
    if found is None:
        return
    _, mapping = found
    for each in _mappings(node, kind):
        for name, child in each.value.items():
            key = mapping.by_name.get(name)
            if key is None:
                continue
            written = yaml.safe_dump(_plain(child), default_flow_style=True, width=10_000, allow_unicode=True).strip()
            written = written.removesuffix("\n...").strip()
            if len(written) <= MAX_EXAMPLE and "\n" not in written:
                examples.setdefault(id(key), written)
            _collect(child, key.kind, examples)


def _mappings(node: Node, kind: Kind) -> Iterator[Node]:
    """Yield the mappings of known keys in a value: itself, each item of a list, or each value of a table."""
    match kind:
        case Several():
            for item in node.value if isinstance(node.value, list) else [node]:
                yield from _mappings(item, kind.item)
        case Table():
            for child in node.value.values() if isinstance(node.value, dict) else ():
                yield from _mappings(child, kind.value)
        case ByKey():
            if isinstance(node.value, dict) and kind.key not in node.value:
                yield node
        case MappingKind() | NameOr():
            if isinstance(node.value, dict):
                yield node
        case Scalar() | Tree():
            pass
        case _:
            assert_never(kind)


def _plain(node: Node) -> Any:  # noqa: ANN401 # any value of YAML
    if isinstance(node.value, dict):
        return {name: _plain(child) for name, child in node.value.items()}
    return [_plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def mappings() -> Mapping[str, MappingKind]:
    """Return the mappings of known keys by their paths, each once."""
    seen: dict[str, MappingKind] = {}
    for _ in _sections(ROOT, "", {}, seen):
        pass
    return seen


def _sections(
    mapping: MappingKind, path: str, examples: Mapping[int, str], seen: dict[str, MappingKind]
) -> Iterator[str]:
    """Yield the table of a mapping's keys, and then those of the mappings in it. What was `seen` elsewhere is named."""
    title = f"`{path}`" if path else "The file"
    yield f"\n## {title}\n\n{mapping.about}\n"
    same = next((where for where, each in seen.items() if set(map(id, each.keys)) <= set(map(id, mapping.keys))), None)
    known = set(map(id, seen[same].keys)) if same else set()
    seen[path] = mapping
    if same:
        yield f"Its keys are those of `{same}`{', and:' if len(known) < len(mapping.keys) else '.'}\n"
    own = [key for key in mapping.keys if id(key) not in known]
    if own:
        yield "| key | value | default | example | |\n|---|---|---|---|---|"
    for key in own:
        yield _row(key, examples.get(id(key)) or EXAMPLES.get(_join(path, key.name)) or EXAMPLES.get(key.name, ""))
    for key in own:
        if found := _mapping_in(key.kind, _join(path, key.name)):
            below, inner = found
            yield from _sections(inner, below, examples, seen)


def _row(key: Key, example: str) -> str:
    default = "" if key.default is None else f"`{_written(key.default)}`"
    name = f"`{key.name}`{', required' if key.is_required else ''}"
    shown = f"`{example}`" if example else ""
    return f"| {name} | {_cell(_expected(key.kind))} | {_cell(default)} | {_cell(shown)} | {_cell(key.about)} |"


def _written(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _expected(kind: Kind) -> str:
    match kind:
        case NameOr():
            return f"{kind.name.expected}, {kind.template.expected}, or a mapping"
        case ByKey():
            return "a mapping"
        case MappingKind():
            return "a mapping"
        case Several():
            return kind.expected if kind.may_be_one else f"{kind.expected}: each {_expected(kind.item)}"
        case Scalar() | Tree() | Table():
            return kind.expected
    assert_never(kind)


def _mapping_in(kind: Kind, path: str) -> tuple[str, MappingKind] | None:
    """Return the mapping of known keys that a value is or has, and the path of its keys; None if it has none."""
    return next(mappings_in(kind, path), None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


if __name__ == "__main__":
    DOCUMENT.write_text(document())
