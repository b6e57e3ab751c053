"""The arrows between the packages, read from the import statements.

cli → commands → run → ingress, engine, ops → the rest → model.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

_BELOW = {"bodies", "log", "rules", "verify", "telemetry", "settings", "text", "model"}
MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"commands", "ops", "settings", "text", "model"},
    "commands": {
        "run",
        "processes",
        "spool",
        "listen_errors",
        "access",
        "garbage",
        "open_log",
        "required_topics",
        "engine",
        "index",
        "listen",
        "ops",
        *_BELOW,
    },
    # The command that puts all of it together.
    "run": {
        "access",
        "api",
        "console",
        "kafka_credentials",
        "garbage",
        "index_keeper",
        "listen_errors",
        "open_files",
        "open_log",
        "open_traces",
        "processes",
        "log_watch",
        "reload",
        "required_topics",
        "ingress",
        "spool",
        "engine",
        "client",
        "ops",
        *_BELOW,
    },
    # A parent, which has no events: it binds ports, and asks its children.
    "processes": {
        "access",
        "ingress",
        "listen_errors",
        "open_files",
        "ops",
        "setting_values",
        "settings",
        "telemetry",
        "model",
    },
    "log_watch": {"engine", "ops", "required_topics", *_BELOW},
    "open_traces": _BELOW,
    # Between the ingress and the log: neither knows it.
    "spool": {"log", "settings", "telemetry", "model"},
    "reload": {"garbage", "required_topics", "ops", "turns", *_BELOW},
    # Of rules, how a file is watched; of senders' keys, how they are kept; a provider is asked through the client.
    "access": {"client", "rules", "settings", "telemetry", "verify", "model"},
    "index_keeper": {"index", *_BELOW},
    "required_topics": _BELOW,
    "open_log": {"kafka_credentials", "spool", *_BELOW},  # a spool is no log
    "kafka_credentials": {"client", *_BELOW},
    "garbage": set(),
    "open_files": set(),
    "sockets": set(),
    "listen_errors": {"model", "settings"},
    # What operators do by command, they do by the API: nothing about events is decided there.
    "api": {"access", "engine", "index", "ops", "required_topics", "turns", *_BELOW},
    # What it asks, it asks the API; what it shows is called as commands call it.
    "console": {"access", "api", "index", "ops", "turns", *_BELOW},
    # On a machine of its own: of a gateway it knows the API, and how deliveries are sent.
    "listen": {"client", "index", "ops", "rules", "model"},
    "ingress": {"quarantine", "sockets", *_BELOW},
    "engine": {"client", *_BELOW},
    "client": {"bodies", "rules", "sockets", "turns", "model"},
    "ops": {
        "access",
        "engine",
        "client",
        "index",
        "quarantine",
        "turns",
        *_BELOW,
    },  # operators give commands, and see the requests that would be made
    "quarantine": {"log", "verify", "model"},
    # What control records mean, and which topics have events, the engine knows; it doesn't know the index. How a hidden
    # value may be repeated, the client does.
    "index": {"engine", "client", "bodies", "log", "text", "turns", "model"},
    "log": {"model"},
    "rules": {"bodies", "model", "text", "turns", "verify"},  # a source has its verifier
    "verify": {"bodies", "model", "text"},
    "bodies": {"model", "text", "turns"},
    "telemetry": {"model"},
    "settings": {"model", "setting_values"},
    "setting_values": set[str](),
    "text": set[str](),
    "turns": set[str](),
    "model": set[str](),
}
"""Part → the other parts of `gateway` that it may import."""

ENGINE_MAY_IMPORT = {
    "worker": {
        "router",
        "ordered",
        "group_member",
        "delivery",
        "dedupe",
        "control",
        "services",
        "unavailable_partitions",
    },
    "router": {
        *("ordered", "group_member", "delivery", "dedupe", "control"),
        *("deliveries_of_event", "event_topics", "partition_tracker", "routing_history_updates", "services", "tiers"),
    },
    "ordered": {"control", "group_member", "delivery", "partition_tracker", "services", "successor_writer"},
    "group_member": {
        *("committer", "delivery", "dedupe", "memory_shares", "partition_tracker", "services"),
        "unavailable_partitions",
    },
    "committer": {"dedupe", "partition_tracker", "services"},
    "jobs": {
        "control",
        "commit_progress",
        "successor_writer",
        "tiers",
        "undecodable_records",
        "unavailable_partitions",
    },
    "delivery": {"control", "partition_tracker", "services", "successor_writer", "tiers"},
    "dedupe": {"undecodable_records"},
    "routing_history_updates": {"control"},
    "services": {"control"},
    "successor_writer": {"alternate_partitions", "control", "services", "undecodable_records"},
    "control": {"undecodable_records"},
    "partition_tracker": {"commit_progress"},
    "alternate_partitions": set[str](),
    "commit_progress": set[str](),
    "deliveries_of_event": set[str](),
    "event_topics": set[str](),
    "memory_shares": set[str](),
    "tiers": set[str](),
    "unavailable_partitions": set[str](),
    "undecodable_records": set[str](),
}
"""Part of the engine, a package or a module → the others that it may import. Operators' jobs know no delivery."""

ONLY_USER: dict[str, str | tuple[str, ...]] = {
    "aiokafka": "gateway/log/kafka/",
    "opentelemetry": "gateway/telemetry/traces.py",
    "cel": ("gateway/rules/expressions.py", "gateway/rules/cel_compiler.py"),
    "jinja2": "gateway/console/assets.py",
    "oauthlib": "gateway/access/oidc.py",
    "re2": "gateway/rules/patterns.py",
    "sqlite3": ("gateway/log/embedded/", "gateway/index/"),
}
"""Library → the one module, or package, that knows it; each of two files of SQLite has its own."""

PURE = {
    *(f"gateway/api/{name}.py" for name in ("cursors", "json_shapes", "openapi", "overview", "problems", "visibility")),
    *(f"gateway/access/{name}.py" for name in ("access_file", "throttle", "local_request", "oidc", "principal")),
    *(f"gateway/access/{name}.py" for name in ("sealed", "sessions", "sign_in_lines", "tokens")),
    *(f"gateway/bodies/{name}.py" for name in ("codings", "content", "forms", "media_types", "redaction", "xml")),
    *(f"gateway/console/{name}.py" for name in ("body_views", "curl", "figures", "json_layout", "page", "text")),
    "gateway/client/request.py",
    "gateway/client/http1.py",
    "gateway/client/masking.py",
    "gateway/client/observation.py",
    "gateway/client/response_excerpt.py",
    "gateway/client/retry_after.py",
    "gateway/ingress/admission.py",
    "gateway/ingress/body_memory.py",
    "gateway/ingress/certificate_headers.py",
    "gateway/ingress/client_address.py",
    "gateway/ingress/idle_connections.py",
    "gateway/ingress/key_budget.py",
    "gateway/ingress/opening_connections.py",
    "gateway/ingress/pending_tokens.py",
    "gateway/ingress/proxy_protocol.py",
    "gateway/engine/delivery/breaker.py",
    "gateway/engine/dedupe/index.py",
    "gateway/engine/jobs/shared_identities.py",
    "gateway/engine/jobs/redelivery_plan.py",
    "gateway/engine/control/redelivery_records.py",
    "gateway/engine/delivery/destination_lanes.py",
    "gateway/engine/alternate_partitions.py",
    "gateway/engine/commit_progress.py",
    "gateway/engine/deliveries_of_event.py",
    "gateway/engine/delivery/retry_decision.py",
    "gateway/engine/ordered/duplicate_appends.py",
    "gateway/engine/ordered/kick_tally.py",
    "gateway/engine/tiers.py",
    *(
        f"gateway/index/{name}.py"
        for name in (
            "candidates",
            "conditions",
            "delivery_query",
            "event_numbers",
            "lives",
            "query",
            "tallies",
            "terms",
            "traffic_schema",
        )
    ),
    "gateway/index/leader_clocks.py",
    "gateway/index/settlement.py",
    *(f"gateway/listen/{name}.py" for name in ("copies", "messages", "cursor")),
    "gateway/ops/live_list.py",
    *(f"gateway/processes/{name}.py" for name in ("metrics_page", "restarts")),
    "gateway/quarantine/claims.py",
    "gateway/quarantine/quota.py",
    *(f"gateway/spool/{name}.py" for name in ("records", "topic_move", "fair_turns", "waiting")),
    "gateway/log/attempt_records.py",
    "gateway/log/audit_records.py",
    "gateway/quarantine/records.py",
    "gateway/rules/batches.py",
    "gateway/rules/destination_choice.py",
    "gateway/rules/cel_compiler.py",
    "gateway/rules/cel_semantics.py",
    "gateway/rules/cost.py",
    "gateway/rules/expressions.py",
    "gateway/rules/operations.py",
    "gateway/rules/passed_values.py",
    "gateway/rules/scanner.py",
    "gateway/rules/route_table.py",
    "gateway/rules/templates.py",
    "gateway/rules/event_view.py",
    "gateway/verify/client_certificates.py",
    "gateway/verify/content.py",
    "gateway/verify/kept_proof.py",
    "gateway/verify/key_ring.py",
    "gateway/verify/message_signatures.py",
    "gateway/verify/pending.py",
    "gateway/verify/public_keys.py",
    "gateway/verify/remote_keys.py",
    "gateway/verify/sns.py",
    "gateway/verify/signatures.py",
    "gateway/verify/signing_methods.py",
    "gateway/verify/request.py",
    "gateway/verify/schemes.py",
    "gateway/verify/structured_fields.py",
    "gateway/verify/verifier.py",
}
MAX_LINES = 500
LONG = {
    "gateway/log/kafka/consumer.py",
    "gateway/ops/migrate.py",
    "gateway/rules/schema.py",
    "gateway/telemetry/metrics.py",
}
"""What is longer than that; ARCHITECTURE.md says why."""
IMPURE = {"aiohttp", "aiokafka", "asyncio", "random", "socket", "time"}
"""What a module that decides doesn't import: it is told the time, the random number and what was read."""


class Import(NamedTuple):
    """An import statement: where it stands, and the dotted name it makes known."""

    file: str
    line: int
    name: str

    @property
    def text(self) -> str:
        return f"{self.file}:{self.line}: imports {self.name}"

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]

    @property
    def part(self) -> str | None:
        """The part of `gateway` that is imported, None if it isn't ours."""
        package, _, rest = self.name.partition(".")
        return rest.partition(".")[0] if package == "gateway" else None


def imports_under(root: Path) -> list[Import]:
    """Read every import of `gateway` below `root`, wherever in a module it stands."""
    return [
        Import(path.relative_to(root).as_posix(), line, name)
        for path in sorted((root / "gateway").rglob("*.py"))
        for line, name in _names(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(root))
    ]


def _names(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            yield from [(node.lineno, f"{module}.{alias.name}") for alias in node.names]


def part_of(file: str, level: int = 1) -> str:
    """Return the part of `gateway`, or of one of its packages, that a file belongs to.

    A package's own `__init__` is `__init__`.
    """
    return file.removesuffix(".py").split("/")[level]


def against_the_arrows(imports: list[Import]) -> list[str]:
    return [
        f"{found.text}: expected {part_of(found.file)} to know of {', '.join(sorted(allowed)) or 'no other part'}"
        for found in imports
        if found.part is not None
        and found.part != part_of(found.file)
        and found.part not in (allowed := MAY_IMPORT.get(part_of(found.file), set[str]()))
    ]


def against_the_arrows_of_the_engine(imports: list[Import]) -> list[str]:
    return [
        f"{found.text}: expected {part} to know of {', '.join(sorted(allowed)) or 'no other part of the engine'}"
        for found in imports
        if found.file.startswith("gateway/engine/") and found.name.startswith("gateway.engine.")
        for part, target in [(part_of(found.file, 2), found.name.split(".")[2])]
        if target != part and target not in (allowed := ENGINE_MAY_IMPORT.get(part, set[str]()))
    ]


def beside_the_only_user(imports: list[Import]) -> list[str]:
    return [
        f"{found.text}: expected only {user if isinstance(user, str) else ', '.join(user)} to"
        for found in imports
        if (user := ONLY_USER.get(found.library)) is not None and not found.file.startswith(user)
    ]


def impure(imports: list[Import]) -> list[str]:
    return [
        f"{found.text}: expected a module that decides without clock, chance or I/O"
        for found in imports
        if found.file in PURE and found.library in IMPURE
    ]


def circles(imports: list[Import]) -> list[list[str]]:
    """Return the modules that import each other, wherever in them and if only for types."""
    modules = {_module_of(found.file) for found in imports}
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        target = found.name if found.name in modules else found.name.rpartition(".")[0]
        if target in modules and target != _module_of(found.file):
            arrows[_module_of(found.file)].add(target)
    return [sorted(circle) for circle in {frozenset(_circle(module, arrows)) for module in modules} if circle]


def _circle(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """Return the modules on a way from a module back to itself."""
    reached = {module: _reachable(module, arrows) for module in _reachable(start, arrows)}
    return {module for module, beyond in reached.items() if start in beyond}


def _reachable(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        for module in arrows[waiting.pop()] - reached:
            reached.add(module)
            waiting.append(module)
    return reached


def _module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_under(ROOT)


def test_imports_follow_the_arrows(imports: list[Import]) -> None:
    assert len(imports) > 50
    assert not (found := against_the_arrows(imports)), "\n".join(found)


def test_imports_within_the_engine_follow_the_arrows(imports: list[Import]) -> None:
    assert not (found := against_the_arrows_of_the_engine(imports)), "\n".join(found)


def test_the_arrows_of_the_engine_make_no_circle() -> None:
    assert [part for part in ENGINE_MAY_IMPORT if part in _reachable(part, ENGINE_MAY_IMPORT)] == []


def test_no_modules_import_each_other(imports: list[Import]) -> None:
    assert circles(imports) == []


def test_a_circle_is_found() -> None:
    found = [
        Import("gateway/a.py", 1, "gateway.b"),
        Import("gateway/b.py", 1, "gateway.c.something"),
        Import("gateway/c.py", 1, "gateway.b.other"),
    ]
    assert circles(found) == [["gateway.b", "gateway.c"]]


def test_every_part_has_its_place() -> None:
    parts = {part_of(path.relative_to(ROOT).as_posix()) for path in (ROOT / "gateway").rglob("*.py")}
    assert parts - {"__init__"} <= MAY_IMPORT.keys()
    engine = {part_of(path.relative_to(ROOT).as_posix(), 2) for path in (ROOT / "gateway/engine").rglob("*.py")}
    assert engine - {"__init__"} == ENGINE_MAY_IMPORT.keys()


def test_a_module_of_more_than_500_lines_has_its_reason() -> None:
    long = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gateway").rglob("*.py")
        if len(path.read_text("utf-8").splitlines()) > MAX_LINES
    }
    assert long == LONG
    architecture = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert [file for file in long if f"`{file.removeprefix('gateway/')}`" not in architecture] == []


def test_what_a_package_says_of_its_modules_is_of_modules_that_it_has() -> None:
    """A package's docstring has lines like "name, other …    what they do"."""
    named: list[Path] = []
    for path in (ROOT / "gateway").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for line in text.splitlines()[1:]:
            if found := re.match(r"([a-z_0-9/]+(?:, [a-z_0-9/]+)*)(?: …)?  +\S", line):
                named += [path.parent / name for name in found[1].split(", ")]
    assert len(named) > 100  # so they are found
    assert [each for each in named if not each.with_suffix(".py").exists() and not each.is_dir()] == []


def test_a_library_that_we_wrap_has_one_user(imports: list[Import]) -> None:
    assert not (found := beside_the_only_user(imports)), "\n".join(found)


def test_pure_modules_have_no_clock_chance_or_io(imports: list[Import]) -> None:
    assert [file for file in PURE if not (ROOT / file).exists()] == []
    assert not (found := impure(imports)), "\n".join(found)


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    for file, source in {
        "model.py": "import time\n",
        "log/base.py": "from gateway import model\nfrom gateway.engine.delivery.destination_lanes import Lane\n",
        "log/kafka/errors.py": "import aiokafka.errors\n",
        "engine/delivery/destination_lanes.py": "def wait():\n    from time import sleep\n",
        "engine/worker.py": "from .router import Router\nfrom ..cli import main\nfrom aiokafka import TopicPartition\n",
        "engine/jobs/kick.py": "from gateway.engine.delivery.destination_lanes import Lane\n",
        "rules/load.py": "import gateway.verify.schemes\n",
        "verify/schemes.py": "import gateway.rules.load\n",
    }.items():
        path = tmp_path / "gateway" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    imports = imports_under(tmp_path)
    assert [problem.split(": expected")[0] for problem in against_the_arrows(imports)] == [
        "gateway/engine/worker.py:2: imports gateway.cli.main",
        "gateway/log/base.py:2: imports gateway.engine.delivery.destination_lanes.Lane",
        "gateway/verify/schemes.py:1: imports gateway.rules.load",
    ]
    assert [problem.split(": expected")[0] for problem in against_the_arrows_of_the_engine(imports)] == [
        "gateway/engine/jobs/kick.py:1: imports gateway.engine.delivery.destination_lanes.Lane"
    ]
    assert beside_the_only_user(imports) == [
        "gateway/engine/worker.py:3: imports aiokafka.TopicPartition: expected only gateway/log/kafka/ to"
    ]
    assert [problem.split(": expected")[0] for problem in impure(imports)] == [
        "gateway/engine/delivery/destination_lanes.py:2: imports time.sleep"
    ]
