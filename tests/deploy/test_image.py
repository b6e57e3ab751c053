"""The image, built for real by buildah on a Debian that debootstrap makes: `make image`, some minutes.

Its base is cached in .tools/containers; what the Dockerfile does to it is done anew each time.
"""

import hashlib
import hmac
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from typing_extensions import override

from dev.tools import HOME
from gateway.model import DISTRIBUTION
from tests.gateway_process import free_ports

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parent.parent.parent
SUITE = "trixie"  # Debian 13, with the Python (3.13) of the official image that the Dockerfile names.
BASE = f"localhost/gateway-base-{SUITE}"
IMAGE = "localhost/webhook-gateway"
MEBIBYTE = 1024 * 1024
LARGEST = 150 * MEBIBYTE
USER = 10001
SECRET = "only-for-the-image-test"
RULES = {
    "version": 1,
    "sources": {"github": {"verify": {"scheme": "github", "secrets": ["${file:/etc/gateway/github}"]}}},
    "destinations": {"ci": {"url": "…"}},
    "routes": [{"name": "build", "from": "github", "match": {"type": "push"}, "to": "ci"}],
}
PYTHON = "/opt/gateway/bin/python"
START_TIMEOUT = 30.0


class Buildah:
    """buildah without an engine: its storage is a folder, and a container runs as a process of this machine."""

    def __init__(self, program: Path, *, store: Path, scratch: Path) -> None:
        self._scratch = scratch
        policy = scratch / "policy.json"
        policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self._policy = f"--signature-policy={policy}"
        self._command = (program, "--storage-driver=vfs", f"--root={store}", f"--runroot={scratch / 'run'}")

    def __call__(self, *arguments: str | Path) -> str:
        result = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{arguments[0]}: {result.stdout[-4000:]}{result.stderr[-4000:]}"
        return result.stdout.strip()

    def build(self, folder: Path, name: str, *options: str) -> None:
        # As Docker writes images: OCI's form has no place for a health check.
        self("bud", "--isolation=chroot", "--format=docker", self._policy, f"--tag={name}", *options, folder)

    def has(self, name: str) -> bool:
        return name in self("images", "--format={{.Name}}").splitlines()

    @contextmanager
    def container(self) -> Iterator["Container"]:
        name = self("from", self._policy, "--pull-never", IMAGE)
        try:
            config = json.loads(self("inspect", name))["Docker"]["config"]
            yield Container(self, name, Path(self("mount", name)), config)
        finally:
            self("rm", name)

    def starter(self, container: str, *options: str) -> list[str | Path]:
        """Return what a command in a container is started with."""
        return [*self._command, "run", "--isolation=chroot", *options, container, "--"]


class Container:
    """A container of the image: its files, its configuration, and processes in it."""

    def __init__(self, buildah: Buildah, name: str, root: Path, config: dict[str, Any]) -> None:
        self.root = root
        self.config = config
        self._buildah = buildah
        self._name = name

    @contextmanager
    def running(
        self, command: Sequence[str], *, rules: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a process, which has ended when this does."""
        options = [f"--env={name}={value}" for name, value in (environ or {}).items()]
        if rules is not None:
            options.append(f"--volume={rules}:/etc/gateway:ro")
        process = subprocess.Popen(
            [*self._buildah.starter(self._name, *options), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                # A buildah that is killed would leave what it has started.
                for pid in [] if process.poll() is not None else _below(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def run(
        self, command: Sequence[str], *, rules: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Return the exit code, and what it wrote to stdout and stderr."""
        with self.running(command, rules=rules, environ=environ) as process:
            output, errors = process.communicate(timeout=START_TIMEOUT)
            return process.returncode, output, errors

    @property
    def entrypoint(self) -> list[str]:
        return [*self.config["Entrypoint"], *self.config["Cmd"]]


@pytest.fixture(scope="module")
def buildah(
    request: pytest.FixtureRequest, tool: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Buildah]:
    """Build the image, and print what it took."""
    if not request.config.getoption("--full"):
        pytest.skip("builds for minutes: `make image`, or --full")
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a file system")
    scratch = tmp_path_factory.mktemp("image")
    buildah = Buildah(tool("buildah"), store=HOME / "containers", scratch=scratch)
    if not buildah.has(BASE):
        _make_base(buildah, tool("debootstrap"), scratch)
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    pip = Path("/etc/pip.conf")
    # Where this machine has to be told how the package index is reached, so has the build.
    mounts = [f"--volume={file}:{file}:ro" for file in (certificates, pip) if file.exists()]
    began = time.monotonic()
    arguments = {"BASE": BASE, "VERSION": "0.0.0", "REVISION": "0123456789abcdef"}
    buildah.build(ROOT, IMAGE, *mounts, *[f"--build-arg={name}={value}" for name, value in arguments.items()])
    print(f"\nbuilt in {time.monotonic() - began:.0f} s")  # noqa: T201 - a figure that `make image` shows
    yield buildah
    buildah("rmi", IMAGE)


@pytest.fixture(scope="module")
def container(buildah: Buildah) -> Iterator[Container]:
    with buildah.container() as container:
        yield container


def _make_base(buildah: Buildah, debootstrap: Path, scratch: Path) -> None:
    tree, context = scratch / "tree", scratch / "base"
    include = "--include=python3,python3-venv,ca-certificates,tzdata"
    command = (debootstrap, "--variant=minbase", include, SUITE, tree)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"debootstrap: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    shutil.rmtree(tree / "var/cache/apt")
    context.mkdir()
    subprocess.run(["tar", "--create", f"--file={context / 'base.tar'}", f"--directory={tree}", "."], check=True)
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    buildah.build(context, BASE)
    shutil.rmtree(tree)
    shutil.rmtree(context)


# ---- What is in it ----


def test_it_is_small(container: Container) -> None:
    files = [file for file in container.root.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files)
    print(f"{size / MEBIBYTE:.0f} MiB in {len(files)} files")  # noqa: T201 - a figure that `make image` shows
    assert size < LARGEST


def test_there_is_no_shell_and_nothing_that_installs(container: Container) -> None:
    programs = {file.name for file in container.root.rglob("bin/*")}
    assert {"gateway", "python"} <= programs
    assert not [
        name for name in programs if re.fullmatch(r"(ba|da|z)?sh|busybox|env|pip.*|apt.*|dpkg.*|ldconfig", name)
    ]
    assert not list(container.root.rglob("site-packages/pip"))
    assert not list(container.root.rglob("ensurepip"))


def test_its_user_can_write_nothing_but_the_logs_folder_and_tmp(container: Container) -> None:
    assert container.config["User"] == f"{USER}:{USER}"
    own = []
    for file in container.root.rglob("*"):
        if not file.is_symlink():
            status = file.stat()
            assert not status.st_mode & 0o6000, f"{file} runs as somebody else"
            if status.st_uid == USER or status.st_mode & 0o002:
                own.append(str(file.relative_to(container.root)))
    assert sorted(own) == ["tmp", "var/lib/gateway"]


def test_the_bill_of_materials_has_every_distribution_and_the_libraries(container: Container) -> None:
    bom = json.loads((container.root / "usr/share/doc/webhook-gateway/bom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == DISTRIBUTION
    told = {(each["name"].lower().replace("_", "-"), each["version"]) for each in bom["components"]}
    there = set()
    for folder in container.root.glob("opt/gateway/lib/python3*/site-packages/*.dist-info"):
        name, _, number = folder.name.removesuffix(".dist-info").partition("-")
        there.add((name.lower().replace("_", "-"), number))
    there = {each for each in there if each[0] != DISTRIBUTION}
    assert there
    assert there <= told | {(name.replace(".", "-"), number) for name, number in told}
    pinned = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE)
    assert there <= {(name.lower().replace(".", "-"), number) for name, number in pinned} | {
        (name.lower(), number) for name, number in pinned
    }
    assert {"python", "libc6", "libssl3t64", "libsqlite3-0", "ca-certificates"} <= {name for name, _ in told}


def test_its_labels_name_its_origin(container: Container) -> None:
    labels = container.config["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.0.0"
    assert labels["org.opencontainers.image.revision"] == "0123456789abcdef"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_everything_that_it_may_need_loads(container: Container) -> None:
    """Modules that are loaded only where they are asked for, and the authorities that it trusts."""
    modules = "gateway.cli, opentelemetry.sdk.trace, opentelemetry.exporter.otlp.proto.http, sqlite3, zlib, cramjam"
    script = f"import ssl, pyexpat, {modules}; print(len(ssl.create_default_context().get_ca_certs()) > 50)"
    assert container.run([PYTHON, "-W", "error", "-c", script]) == (0, "True\n", "")


# ---- What it does ----


def test_it_takes_an_event_in_drains_and_leaves(container: Container, tmp_path: Path) -> None:
    port, admin = free_ports(2)
    environ = {"GATEWAY_LISTEN": f"127.0.0.1:{port}", "GATEWAY_ADMIN": f"127.0.0.1:{admin}"}
    with ExitStack() as stack:
        sink = stack.enter_context(a_sink())
        rules = _write_rules(tmp_path, sink.url)
        process = stack.enter_context(container.running(container.entrypoint, rules=rules, environ=environ))
        lines = Lines(process)
        lines.wait_for("listening")
        # Of buildah's own processes some have the gateway's words after theirs.
        [gateway] = [
            pid for pid in _below(process.pid) if _words_of(pid)[:2] == [PYTHON, *container.config["Entrypoint"]]
        ]
        assert _user_of(gateway) == USER
        assert container.run(container.config["Healthcheck"]["Test"][1:], environ=environ)[0] == 0

        assert _send(port, b'{"ref": "refs/heads/main"}', forged=True) == 401
        assert _send(port, b'{"ref": "refs/heads/main"}') == 202
        # The delivery is under way when it is asked to end, and ends well before it does.
        assert sink.arrived.wait(10)
        os.kill(gateway, signal.SIGTERM)
        lines.wait_for("stopping")
        sink.answer.set()
        assert lines.wait_for("delivery_finished")["outcome"] == "delivered"
        lines.wait_for("stopped")
        assert process.wait(START_TIMEOUT) == 0
    assert sink.bodies == [b'{"ref": "refs/heads/main"}']
    assert container.run(container.config["Healthcheck"]["Test"][1:], environ=environ)[0] == 1


def test_bad_rules_end_it_at_once_with_their_place(container: Container, tmp_path: Path) -> None:
    rules = _write_rules(tmp_path, "http://127.0.0.1:9/")
    (rules / "routes.yaml").write_text("version: 1\nsource: {}\n")
    code, _, errors = container.run(container.entrypoint, rules=rules)
    assert code == 2
    assert "/etc/gateway/routes.yaml:2:1: source: " in errors


def test_a_setting_that_makes_no_sense_ends_it_at_once(container: Container, tmp_path: Path) -> None:
    rules = _write_rules(tmp_path, "http://127.0.0.1:9/")
    code, _, errors = container.run(container.entrypoint, rules=rules, environ={"GATEWAY_ROLE": "boss"})
    assert code == 2
    assert "GATEWAY_ROLE: expected all, ingress, router, got 'boss'" in errors


def test_without_rules_it_says_which_file_it_looked_for(container: Container) -> None:
    code, _, errors = container.run(container.entrypoint)
    assert code == 2
    assert "/etc/gateway/routes.yaml" in errors


# ---- Helpers ----


class Lines:
    """The lines of a gateway's log, as it writes them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told: list[str] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """Read on until there is a line of an event, and return it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._told.append(line)
            if line.startswith("{") and (fields := json.loads(line))["event"] == event:
                return dict(fields)
        assert self._process.stderr is not None
        pytest.fail(f"expected a line {event}, got {''.join(self._told)}{self._process.stderr.read()}")


class Sink:
    """A destination that answers when it is told to."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.answer = threading.Event()
        self.bodies: list[bytes] = []
        self.url = ""


@contextmanager
def a_sink() -> Iterator[Sink]:
    sink = Sink()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sink.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            sink.arrived.set()
            sink.answer.wait(20)
            self.send_response(200)
            self.end_headers()

        @override
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sink.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield sink
    finally:
        sink.answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _write_rules(folder: Path, url: str) -> Path:
    """Write rules and their secret as a mounted folder has them: readable for everyone."""
    rules = folder / "rules"
    rules.mkdir()
    (rules / "routes.yaml").write_text(yaml.safe_dump({**RULES, "destinations": {"ci": {"url": url}}}))
    (rules / "github").write_text(SECRET)
    return rules


def _send(port: int, body: bytes, *, forged: bool = False) -> int:
    digest = hmac.new(b"another" if forged else SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-Hub-Signature-256": f"sha256={digest}", "X-GitHub-Event": "push", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/in/github", data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), Unfailing())
    with opener.open(request, timeout=10) as response:
        return int(response.status)


class Unfailing(urllib.request.HTTPErrorProcessor):
    """Returns answers that urllib would raise."""

    @override
    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response


def _below(pid: int) -> set[int]:
    """Return the processes below another one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {each for each, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def _words_of(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def _user_of(pid: int) -> int:
    [user] = re.findall(r"^Uid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(user)
