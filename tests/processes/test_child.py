"""What a child knows of its parent."""

import socket
import stat
import tempfile
from pathlib import Path

import pytest

import gateway.kafka_credentials  # noqa: F401 - `open_log` imports it late: its files would be read in the event loop
from gateway.log.kafka.log import KafkaLog
from gateway.model import UsageError
from gateway.open_log import open_log
from gateway.processes.child import VARIABLE, Child, child_in
from gateway.processes.supervisor import private_folder
from gateway.settings import from_sources, refuse_useless_processes
from gateway.spool.orphans import orphaned_files

KAFKA = {"log": "kafka://127.0.0.1:9092"}


def test_what_a_parent_tells_is_what_its_child_takes_and_no_grandchild() -> None:
    child = Child(number=1, folder=Path("/run/gateway-x"), own=(5,), others=(6, 7))
    environ = {**child.variables(), "PATH": "/bin"}
    assert child_in(environ) == child
    assert environ == {"PATH": "/bin"}
    assert child_in(environ) is None
    assert child.admin == Path("/run/gateway-x/1.sock")


@pytest.mark.parametrize("text", ["1", "{}", '{"number": "x", "folder": "/", "own": [], "others": []}'])
def test_what_no_parent_has_set_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=VARIABLE):
        child_in({VARIABLE: text})


def test_each_process_has_names_and_files_of_its_own_and_the_first_has_the_index() -> None:
    settings = from_sources({**KAFKA, "processes": "3", "spool": "sqlite:///spool.db", "index": "index.db"}, {})
    own = [Child(number=number, folder=Path("/x")).settings(settings) for number in range(3)]
    assert [each.spool.file for each in own] == [
        Path("spool.db"),
        Path("spool.process-1.db"),
        Path("spool.process-2.db"),
    ]
    assert [each.instance for each in own] == ["9090-0", "9090-1", "9090-2"]
    assert settings.instance == "9090"
    assert [each.keeps_index for each in own] == [True, False, False]
    assert [each.serves_api for each in own] == [True, False, False]


def test_spools_of_processes_that_there_are_no_more_are_found_by_the_first(tmp_path: Path) -> None:
    for name in ("spool.db", "spool.process-1.db", "spool.process-3.db", "spool.process-12.db"):
        (tmp_path / name).touch()
    for name in ("spool.process-3.db-wal", "spool.process-3.db.lock", "spool.process-x.db", "other.process-4.db"):
        (tmp_path / name).touch()
    spool = f"sqlite:///{tmp_path / 'spool.db'}"

    def orphans(processes: int, number: int | None) -> list[str]:
        settings = from_sources({**KAFKA, "processes": str(processes), "spool": spool}, {})
        if number is not None:
            settings = Child(number=number, folder=tmp_path).settings(settings)
        return [each.name for each in orphaned_files(settings)]

    assert orphans(1, None) == ["spool.process-1.db", "spool.process-12.db", "spool.process-3.db"]
    assert orphans(2, 0) == ["spool.process-12.db", "spool.process-3.db"]
    assert orphans(4, 0) == ["spool.process-12.db"]
    assert orphans(2, 1) == []
    assert orphaned_files(from_sources(KAFKA, {})) == ()


def test_nobody_else_may_enter_the_folder_of_a_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:/run/another")
    with private_folder() as name:
        assert Path(name).parent == tmp_path
        assert stat.S_IMODE(Path(name).stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="expected a folder for temporary files"):
        private_folder()


@pytest.mark.parametrize("variable", ["RUNTIME_DIRECTORY", "TMPDIR"])
def test_a_folder_whose_sockets_would_have_too_long_names_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv(variable, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(UsageError, match=rf"got {folder}/gateway-.*: set {variable} to a shorter one"):
        private_folder()
    assert list(folder.iterdir()) == []


def test_several_processes_are_refused_where_they_cannot_share_the_work() -> None:
    with pytest.raises(UsageError, match="an embedded log, whose file belongs to one process"):
        refuse_useless_processes(from_sources({"processes": "2"}, {}))
    with pytest.raises(UsageError, match="console"):
        refuse_useless_processes(from_sources({**KAFKA, "processes": "2", "role": "console"}, {}))
    refuse_useless_processes(from_sources({"processes": "1"}, {}))
    for text in ("0", "129", "two", "-1"):
        with pytest.raises(UsageError, match="expected a number of processes from 1 to 128"):
            from_sources({"processes": text}, {})


async def test_each_process_has_a_name_of_its_own_for_the_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members of a group with one name would evict each other."""
    names: list[str] = []

    async def opened(_: object, *, client_id: str, **__: object) -> None:
        names.append(client_id)

    monkeypatch.setattr(KafkaLog, "open", opened)
    settings = from_sources({**KAFKA, "processes": "2"}, {})
    for each in (settings, *[Child(number=number, folder=Path("/x")).settings(settings) for number in range(2)]):
        await open_log(each, owner=True)
    assert [name.removeprefix(f"gateway-{socket.gethostname()}-") for name in names] == ["9090", "9090-0", "9090-1"]
