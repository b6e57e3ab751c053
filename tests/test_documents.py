"""What the documents name is there: tests, checks of the simulation, targets of make, files, and places to go to."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from dev import keys, providers, request_presets
from gateway.cli import main
from gateway.engine.dedupe.index import ENTRIES_KEPT
from gateway.ops.kick_report import parked_text, paused_text
from gateway.rules.load import check_rules
from gateway.rules.schema import ROOT as ROOT_KIND
from gateway.rules.schema_reader import ABSENT, SchemaReader
from gateway.rules.yaml_document import Problem, parse_document
from gateway.telemetry.metrics import RESPONSE_OUTCOMES

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "THREAT_MODEL.md"] + [
    str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("docs/**/*.md"))
]

CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGET = re.compile(r"\bmake +([a-z]+)")
FILE = re.compile(r"(?<![\w./~@-])((?:gateway|tests|docs|dev|benchmarks)/[\w./-]*)(?:::(\w+))?")
TEST = re.compile(r"(?<!::)\btest_\w+(?![\w.])")
ANOTHER = re.compile(r"^::(test_\w+)")
"""One more test of the file that was named last."""
CHECK = re.compile(r"simulation: (.+)")


class Mention(NamedTuple):
    """Something that a document names."""

    line: int
    kind: str
    name: str


def mentions(text: str) -> Iterator[Mention]:
    """Yield what stands in code (spans and blocks), and where links lead."""
    is_block, last = False, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            is_block = not is_block
            continue
        yield from (Mention(number, "link", link) for link in LINK.findall(line) if "://" not in link)
        for code in [line] if is_block else CODE.findall(line):
            yield from (Mention(number, "target of make", target) for target in TARGET.findall(code))
            yield from (Mention(number, "check of the simulation", check) for check in CHECK.findall(code))
            yield from (Mention(number, "test", f"{last}::{test}") for test in ANOTHER.findall(code))
            for path, test in FILE.findall(code):
                last = path
                yield Mention(number, "test" if test else "file", f"{path}::{test}" if test else path)
            yield from (Mention(number, "test", test) for test in TEST.findall(code))


def missing(text: str, name: str = "README.md") -> list[str]:
    """Return a line for each mention of what isn't there. Links are relative to the document of that name."""
    document = ROOT / name
    return [
        f"{name}:{line}: expected a {kind} that exists, got {what}"
        for line, kind, what in mentions(text)
        if not exists(kind, what, document, text)
    ]


def exists(kind: str, name: str, document: Path, text: str) -> bool:
    match kind:
        case "test":
            path, _, test = name.rpartition("::")
            return any(test in tests for file, tests in all_tests().items() if path in ("", file))
        case "check of the simulation":
            return f'"{name}"' in simulation()
        case "target of make":
            return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
        case "file":
            return (ROOT / name).exists()
        case _:
            path, _, anchor = name.partition("#")
            if path and not (document.parent / path).exists():
                return False
            return not anchor or anchor in anchors((document.parent / path).read_text() if path else text)


def anchors(text: str) -> set[str]:
    """Return the places in a document that links can lead to, named as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@cache
def all_tests() -> dict[str, set[str]]:
    return {
        str(file.relative_to(ROOT)): set(re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))
        for file in (ROOT / "tests").rglob("test_*.py")
    }


@cache
def simulation() -> str:
    return "".join([file.read_text() for file in sorted((ROOT / "tests/simulation").glob("*.py"))])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_everything_a_document_names_exists(name: str) -> None:
    assert missing((ROOT / name).read_text(), name) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("See `tests/test_documents.py::test_nothing`.", "test that exists, got tests/test_documents.py::test_nothing"),
        (
            "`tests/test_model.py::test_an_id_is_a_uuid`, `::test_no`",
            "test that exists, got tests/test_model.py::test_no",
        ),
        ("(`test_nothing_of_the_kind`)", "test that exists, got test_nothing_of_the_kind"),
        ("Run `make nothing`.", "target of make that exists, got nothing"),
        ("```\nmake nothing    # at all\n```", "target of make that exists, got nothing"),
        ("It is in `gateway/nothing.py`.", "file that exists, got gateway/nothing.py"),
        ("`simulation: 0 nothing`", "check of the simulation that exists, got 0 nothing"),
        ("[there](docs/nothing.md)", "link that exists, got docs/nothing.md"),
        ("# Title\n[there](#nothing)", "link that exists, got #nothing"),
        ("[there](ARCHITECTURE.md#nothing)", "link that exists, got ARCHITECTURE.md#nothing"),
    ],
)
def test_a_missing_name_is_found_with_its_line(text: str, what: str) -> None:
    line = 2 if text.startswith(("```", "# ")) else 1
    assert missing(text) == [f"README.md:{line}: expected a {what}"]


def test_promises_are_quoted_word_for_word() -> None:
    guarantees = (ROOT / "docs/guarantees.md").read_text()
    quotes = [block.replace("\n>", " ")[1:] for block in re.findall(r"(?:^>.*\n)+", guarantees, re.MULTILINE)]
    promised = plain((ROOT / "README.md").read_text() + (ROOT / "docs/rules.md").read_text())
    assert len(quotes) >= 6
    assert [quote for quote in quotes if plain(quote).rstrip(".") not in promised] == []


def test_the_number_of_contents_kept_per_identity_is_documented() -> None:
    told = f"content beyond its first {ENTRIES_KEPT} variants"
    assert told in (ROOT / "docs/rules.md").read_text()
    assert f"the first {ENTRIES_KEPT} are known" in plain((ROOT / "docs/guarantees.md").read_text())


def test_the_outcomes_of_requests_that_wait_for_a_destination_are_documented() -> None:
    told = (ROOT / "docs/rules.md").read_text().partition("`gateway_destination_responses_total{source,outcome}`")[2]
    assert plain(told).startswith(f"counts them: {', '.join([f'`{each}`' for each in RESPONSE_OUTCOMES])};")


def test_what_a_kick_prints_of_a_pause_is_quoted() -> None:
    told, whole = (ROOT / "docs/retries.md").read_text(), "destination ci"
    printed = [
        paused_text(whole, ["destination/ci"])[0],
        paused_text("route build", ["destination/ci"])[0],
        parked_text(whole, {"destination/ci": 1}, 0)[0],
    ]
    assert [text for text in printed if f"`{text.removeprefix('; ')}`" not in told] == []


def plain(text: str) -> str:
    """Return a string without its line ends, stresses and capitals, and with links as they are within `docs/`."""
    return " ".join(text.replace("**", "").replace("](docs/", "](").lower().split())


def test_existing_names_are_found() -> None:
    text = (
        "# The title, as it is\n"
        "`tests/test_documents.py::test_existing_names_are_found`, `::test_existing_names_are_found`,\n"
        "`test_existing_names_are_found`, `make test`, `simulation: 22 order`,\n"
        "`gateway/verify/`, [here](#the-title-as-it-is), [there](ARCHITECTURE.md#code-map)\n"
        "They make nothing, `/etc/gateway/nothing.yaml` isn't ours, [elsewhere](https://example.com/nothing)"
    )
    assert missing(text) == []
    assert len(list(mentions(text))) == 8


def test_the_document_of_providers_is_the_one_of_the_presets() -> None:
    assert providers.DOCUMENT.read_text() == providers.document(), "run `python -m dev.providers`"
    assert request_presets.DOCUMENT.read_text() == request_presets.document(), "run `python -m dev.request_presets`"


def test_the_document_of_keys_is_that_of_the_schema() -> None:
    assert keys.DOCUMENT.read_text() == keys.document(), "run `python -m dev.keys`"


@pytest.mark.parametrize(("path", "example"), keys.EXAMPLES.items())
def test_an_example_of_a_key_is_right(path: str, example: str) -> None:
    kinds = {
        f"{where}.{key.name}" if where else key.name: key.kind
        for where, mapping in keys.mappings().items()
        for key in mapping.keys
    }
    kind = kinds.get(path) or kinds[f"routes[].{path}"]
    problems: list[Problem] = []
    root = parse_document("keys", f"example: {example}", problems)
    assert root is not None
    reader = SchemaReader({}, is_strict=False)
    assert reader.read(root.value["example"], kind) is not ABSENT or path == "secrets"
    assert [each for each in (*problems, *reader.problems) if each.code != "unresolved"] == []


BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROOT_KEYS = frozenset(key.name for key in ROOT_KIND.keys)
MANY_BLOCKS = 20


def rule_blocks() -> Iterator[tuple[str, str, bool]]:
    """Yield where a block of rules is, its text as a whole rule file, and whether it is more than a part of one."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        for number, text in enumerate(BLOCK.findall(document.read_text())):
            where, keys = f"{document.name}-{number}", set(re.findall(r"^([a-z_]+):", text, re.MULTILINE))
            if keys == {"request"}:
                indented = "".join(f"    {line}\n" for line in text.splitlines())
                yield where, f"version: 1\nroutes:\n  - name: r\n    from: s\n    to: d\n{indented}", False
            elif keys and keys <= ROOT_KEYS:
                yield where, text if "version" in keys else f"version: 1\n{text}", "version" in keys


BLOCKS = pytest.mark.parametrize(
    ("text", "is_whole"),
    [(text, is_whole) for _, text, is_whole in rule_blocks()],
    ids=[where for where, *_ in rule_blocks()],
)


@BLOCKS
def test_a_block_of_rules_is_right(text: str, is_whole: bool, tmp_path: Path) -> None:  # noqa: ARG001, FBT001 - parameters
    (file := tmp_path / "routes.yaml").write_text(text)
    (tmp_path / "routes.d").mkdir()
    _, problems = check_rules(file, environ={})
    # Of a part, the rest may be elsewhere.
    assert [
        str(each) for each in problems if each.severity == "error" and each.code not in {"unknown_name", "include"}
    ] == []


REFERENCE = re.compile(r"\$\{([A-Z_]+)(?::-[^}]*)?\}")
KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
"""A public key of RFC 8032, section 7.1; any other text where a secret is wanted."""
PARTIAL = frozenset(("unknown_name", "include", "unused", "missing_key", "certificate"))
"""What a part of a rule file may lack, or not use."""


@BLOCKS
def test_a_block_of_rules_passes_the_strict_check(
    text: str,
    is_whole: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As far as it is there: of a part, the rest may be elsewhere; what is included, and files of secrets, aren't."""
    (file := tmp_path / "routes.yaml").write_text(text)
    (tmp_path / "routes.d").mkdir()
    for name in REFERENCE.findall(text):
        value = "https://elsewhere.example" if name.endswith(("_URL", "_WEBHOOK")) else KEY
        monkeypatch.setenv(name, f"whsec_{'QUJD' * 8}" if name.endswith("SIGNING_SECRET") else value)
    main(["check", "--strict", "--json", str(file)])
    problems = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    excused = {"include"} if is_whole else PARTIAL
    assert [
        each
        for each in problems
        if "code" in each and each["code"] not in excused and not ("${file:" in text and each["code"] == "unresolved")
    ] == []


def test_most_blocks_are_of_rules() -> None:
    assert len(list(rule_blocks())) >= MANY_BLOCKS
