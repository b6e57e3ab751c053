"""The whole stack on one machine: `make stack` starts it, `make stack-down` ends it, `dev/stack.py --check` checks it.

Kafka, an ingress, a router and a console, Prometheus with the rules of deploy/, Alertmanager, and traffic: a sender of
signed events, and receivers of which some fail at times (dev/stack.yaml). All of it listens on loopback. Its data is in
.stack/, with a file for the ID of each process; stopped, it leaves only what was downloaded.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import yaml
from aiohttp import web

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, too

from deploy.grafana.boards import BOARDS  # noqa: E402 - found by the line above
from dev.tools import ToolMissingError, fetch  # noqa: E402
from gateway.ops.send import Sender, sign, source_of  # noqa: E402
from tests.certificates import Authority  # noqa: E402

STACK = ROOT / ".stack"
RULES = ROOT / "dev" / "stack.yaml"
DEPLOY = ROOT / "deploy"
SECRETS = {
    "GITHUB_WEBHOOK_SECRET": "It's a Secret to Everybody",
    "STRIPE_SECRET": "whsec_demo_secret_of_the_stripe_endpoint",
    "OLD_STRIPE_SECRET": "whsec_former_secret_of_the_stripe_endpoint",
}
PORTS = {
    "kafka": 9092,
    "ingress": 8080,
    "ingress-admin": 9191,
    "router-admin": 9192,
    "console-admin": 9193,
    "prometheus": 9090,
    "alertmanager": 9093,
    "receiver": 9101,
    "tls-receiver": 9102,
}
"""The default ports, if they are free."""

SCRAPE_EVERY = 5.0
RATE_INTERVAL = 4 * SCRAPE_EVERY
"""Seconds: Grafana's value of `$__rate_interval`."""
START_TIMEOUT = 60.0
FETCH_TIMEOUT = 600.0
"""Seconds for Kafka, which may have to be downloaded first."""
STOP_TIMEOUT = 35.0
"""Seconds for a process to end by itself; a gateway drains for up to 25."""
CHECK_TIMEOUT = 150.0
"""Seconds within which each panel has something to show: a destination is down once in two minutes."""
CERTIFICATE_LIFE = timedelta(days=60)  # long enough for the alerts to keep quiet
EVENTS_PER_SECOND = 20.0
FORGED_EVERY = 50
FAILS = {"/mirror": 0.02, "/legacy": 0.05}
"""The share of requests that a receiver refuses."""
SEARCH = "source:github body.repository.full_name:acme/1"
"""Finds what the traffic sends."""
TURN, DOWN = 120.0, 30.0
"""Seconds: in each turn `chat` is down for so long, from the beginning of the traffic on."""


class StackError(Exception):
    """The stack can't start, or isn't running; the message says what was expected."""


class Stack:
    """The running stack, by its folder. `log` is "kafka" or "embedded", which is one gateway instead of two.

    With its traffic come its faults: some alerts fire then.
    """

    def __init__(
        self,
        folder: Path = STACK,
        *,
        log: str = "kafka",
        scrape_every: float = SCRAPE_EVERY,
        job: str = "",
        has_traffic: bool = True,
    ) -> None:
        self.folder = folder
        self.log = log
        self._job = job  # of Prometheus, for all processes; a job for each role where it is empty
        self._scrape_every = scrape_every
        self._has_traffic = has_traffic
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def prometheus(self) -> str:
        """The URL of Prometheus."""
        return f"http://127.0.0.1:{self.ports['prometheus']}"

    @property
    def ports(self) -> dict[str, int]:
        try:
            return dict(json.loads((self.folder / "ports.json").read_text()))
        except FileNotFoundError:
            raise StackError("expected it to run, got nothing; `make stack` starts it") from None

    @property
    def is_up(self) -> bool:
        """Whether it runs. Raises StackError if a part of it has ended."""
        files = sorted(self.folder.glob("*.pid"))
        ended = [file.stem for file in files if not _is_alive(*_identity(file))]
        if ended and len(ended) < len(files):
            raise StackError(
                f"expected all of it to run, got {', '.join(ended)} ended; `make stack-down` ends the rest"
            )
        return bool(files) and not ended

    def up(self) -> None:
        """Start all of it, and return when all of it responds. Otherwise raises StackError, and leaves nothing."""
        self.down()  # what a machine that was switched off has left
        self.folder.mkdir()
        try:
            self._start()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process of it, the last one first, and remove its folder."""
        files = sorted(self.folder.glob("*.pid"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in files:
            _end(*_identity(file))
        while self._children:  # those that this process has started would stay as zombies
            self._children.pop().wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def urls(self) -> Iterator[tuple[str, str]]:
        """Yield addresses to look at, with what each shows."""
        ports = self.ports
        yield "console", f"http://127.0.0.1:{ports['console-admin']}/ui"
        yield "Prometheus", self.prometheus
        yield "alerts", f"{self.prometheus}/alerts"
        yield "Alertmanager", f"http://127.0.0.1:{ports['alertmanager']}"
        yield "senders post to", f"http://127.0.0.1:{ports['ingress']}/in/github"
        for name, port in ports.items():
            if name.endswith("-admin"):
                yield f"metrics, {name.removesuffix('-admin')}", f"http://127.0.0.1:{port}/metrics"
        yield "log lines", str(self.folder)
        index = shlex.quote(str(self.folder / "index.db"))
        yield "a search of events", f".venv/bin/gateway events search --index {index} {shlex.quote(SEARCH)}"

    def without_data(self, *, timeout: float = CHECK_TIMEOUT) -> list[str]:
        """Run each query of each dashboard until it has returned something; return those that haven't in time."""
        until = time.monotonic() + timeout
        missing = {
            f"{board.title}: {panel.title}: {query.legend}": query.at(rate_interval=f"{4 * self._scrape_every:g}s")
            for board in BOARDS
            for panel in board.panels
            for query in panel.queries
        }
        while missing and time.monotonic() < until:
            for name, expr in list(missing.items()):
                if any(not math.isnan(value) for _, value in ask(self.prometheus, expr)):
                    del missing[name]
            time.sleep(self._scrape_every / 5)
        return list(missing)

    # What it consists of.

    def _start(self) -> None:
        prometheus, alertmanager = fetch("prometheus"), fetch("alertmanager")
        ports = {name: _free_port(port) for name, port in PORTS.items()}
        (self.folder / "ports.json").write_text(json.dumps(ports))
        self._write_rules()
        environ = {
            **SECRETS,
            "RECEIVER": f"http://127.0.0.1:{ports['receiver']}",
            "TLS_RECEIVER": f"https://127.0.0.1:{ports['tls-receiver']}",
            "GATEWAY_RULES": str(self.folder / "routes.yaml"),
            "GATEWAY_LOG": self._log_address(ports),
            "GATEWAY_LISTEN": f"127.0.0.1:{ports['ingress']}",
            "GATEWAY_DEV": "1",
            "GATEWAY_INDEX": str(self.folder / "index.db"),
        }
        if self.log == "kafka":
            data = str(self.folder / "kafka")
            self._spawn("kafka", sys.executable, "dev/kafka.py", "--port", str(ports["kafka"]), "--data", data)
            self._wait("kafka", partial(self._says, "kafka", f"127.0.0.1:{ports['kafka']}"), FETCH_TIMEOUT)
        roles = {"ingress": "all"}
        if self.log == "kafka":
            roles = {"ingress": "ingress", "router": "router", "console": "console"}
        for name, role in roles.items():  # one after the other: the first makes the topics
            admin = {"GATEWAY_ADMIN": f"127.0.0.1:{ports[f'{name}-admin']}", "GATEWAY_ROLE": role}
            self._spawn(name, sys.executable, "-m", "gateway", "run", environ={**environ, **admin})
            self._wait(name, partial(self._says, name, '"event":"listening"'))
        if self._has_traffic:
            self._pause("archive", environ)
            self._spawn("traffic", sys.executable, "dev/stack.py", "--traffic", str(self.folder), environ=environ)
            self._wait("traffic", partial(self._says, "traffic", "sending"))
        self._write_prometheus(ports, [f"{name}-admin" for name in roles])
        self._spawn(
            "alertmanager",
            str(alertmanager),
            f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}",
            f"--storage.path={self.folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{ports['alertmanager']}",
            "--cluster.listen-address=",
        )
        self._spawn(
            "prometheus",
            str(prometheus),
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        )
        for name in ("alertmanager", "prometheus"):
            self._wait(name, partial(_answers, f"http://127.0.0.1:{ports[name]}/-/ready"))

    def _log_address(self, ports: Mapping[str, int]) -> str:
        if self.log == "kafka":
            return f"kafka://127.0.0.1:{ports['kafka']}"
        return f"sqlite:///{self.folder.resolve() / 'gateway.db'}"

    def _write_rules(self) -> None:
        (self.folder / "routes.yaml").write_text(RULES.read_text())
        authority = Authority(life=CERTIFICATE_LIFE)
        (self.folder / "authority.pem").write_text(authority.pem)
        certificate, key = authority.issue("127.0.0.1", life=CERTIFICATE_LIFE)
        (self.folder / "receiver.pem").write_text(certificate + key)

    def _write_prometheus(self, ports: Mapping[str, int], gateways: Sequence[str]) -> None:
        """Write deploy/prometheus/prometheus.yml with the addresses that are ours."""
        settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        every = f"{round(self._scrape_every * 1000)}ms"
        settings["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
        settings["rule_files"] = [str(DEPLOY / "prometheus" / file) for file in settings["rule_files"]]
        [manager] = settings["alerting"]["alertmanagers"]
        manager["static_configs"] = [{"targets": [f"127.0.0.1:{ports['alertmanager']}"]}]
        jobs: dict[str, list[str]] = {}
        for name in gateways:
            job = self._job or f"gateway-{name.removesuffix('-admin')}"
            jobs.setdefault(job, []).append(f"127.0.0.1:{ports[name]}")
        settings["scrape_configs"] = [
            {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
        ]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(settings))

    def _pause(self, destination: str, environ: Mapping[str, str]) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "gateway", "destination", "pause", destination],
            env={**os.environ, **environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_TIMEOUT,
        )
        if result.returncode:
            raise StackError(f"expected {destination} to be paused, got {result.stdout}{result.stderr}")

    # Processes.

    def _spawn(self, name: str, *command: str, environ: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **(environ or {})},
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for whoever reads the log lines
            )
        self._children.append(process)
        (self.folder / f"{name}.pid").write_text(f"{process.pid} {_started(process.pid)}\n")

    def _wait(self, name: str, is_there: Callable[[], bool], timeout: float = START_TIMEOUT) -> None:
        until = time.monotonic() + timeout
        while not is_there():
            if not _is_alive(*_identity(self.folder / f"{name}.pid")):
                raise StackError(f"{name}: expected it to start, got {self._last_words(name)}")
            if time.monotonic() > until:
                raise StackError(f"{name}: expected it within {timeout:g} s, got {self._last_words(name)}")
            time.sleep(0.05)

    def _says(self, name: str, text: str) -> bool:
        return text in (self.folder / f"{name}.log").read_text(errors="replace")

    def _last_words(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]


# ---- Processes of others, by their id ----


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the start of the machine: with its id that names it for good."""
    with suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state != "Z":
            return rest[18]  # proc_pid_stat(5): the 22nd, of which three are before
    return ""


def _identity(file: Path) -> tuple[int, str]:
    pid, _, started = file.read_text().strip().partition(" ")
    return int(pid), started


def _is_alive(pid: int, started: str) -> bool:
    return bool(started) and _started(pid) == started


def _end(pid: int, started: str) -> None:
    """Terminate a process, and kill it if it doesn't end."""
    for number, timeout in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGKILL, STOP_TIMEOUT)):
        if not _is_alive(pid, started):
            break
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        until = time.monotonic() + timeout
        while _is_alive(pid, started) and time.monotonic() < until:
            time.sleep(0.02)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as server:
            return int(server.getsockname()[1])
    raise StackError("expected a free port, got none")


# ---- Prometheus ----


def ask(url: str, expr: str) -> list[tuple[dict[str, str], float]]:
    """Return the series of a query at this moment, each with its value. Raises StackError with what is wrong with it.

    https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries
    """
    data = urllib.parse.urlencode({"query": expr}).encode()
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query", data, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
    except OSError as error:
        detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
        raise StackError(f"{expr}: {detail}") from error
    result = answer["data"]["result"]
    if answer["data"]["resultType"] == "scalar":
        return [({}, float(result[1]))]
    return [(each["metric"], float(each["value"][1])) for each in result]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


# ---- Traffic ----


async def traffic(folder: Path) -> None:
    """Receive what the gateway delivers, and send it events, until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    ports = Stack(folder).ports
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "receiver.pem")
    async with _receiver(ports["receiver"]), _receiver(ports["tls-receiver"], tls), asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(_send(folder / "routes.yaml", f"http://127.0.0.1:{ports['ingress']}"), name="send")
        print("sending", flush=True)
        await stopped.wait()
        sending.cancel()


@asynccontextmanager
async def _receiver(port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    began = time.monotonic()

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        chance = random.random()
        match request.path:
            case "/chat" if (time.monotonic() - began) % TURN < DOWN:
                return web.Response(status=503)
            case "/mirror" if chance < FAILS["/mirror"]:
                return web.Response(status=503)
            case "/legacy" if chance < FAILS["/legacy"]:
                return web.Response(status=410)
            case _:
                return web.Response(status=200)

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def _send(rules: Path, url: str) -> None:
    """Send pushes of four repositories, and failed payments; one in fifty is a forgery."""
    github, stripe = (source_of(rules, name, secret=None) for name in ("github", "billing"))
    push = orjson.loads((ROOT / "samples" / "github.push.json").read_bytes())
    payment = orjson.loads((ROOT / "samples" / "stripe.invoice.payment_failed.json").read_bytes())
    async with Sender() as sender:
        for number in itertools.count():
            source, verifier = stripe if number % 4 == 0 else github
            if source.name == "github":
                push["repository"]["full_name"] = f"acme/{number % 5}"
                body = orjson.dumps({**push, "n": number})
            else:
                # Every tenth comes twice, as providers do that got no answer in time.
                body = orjson.dumps({**payment, "id": f"evt_{number - number % 40 // 36 * 4}"})
            signed = sign(
                source,
                verifier,
                url=url,
                body=body,
                id=f"{time.time_ns()}",
                type="push",
                headers={},
                now=time.time(),
                is_forged=number % FORGED_EVERY == 1,
            )
            with suppress(OSError, TimeoutError):  # the gateway is down: that is what somebody may want to see
                await sender.send(signed)
            await asyncio.sleep(1 / EVENTS_PER_SECOND)


# ---- The command ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="start it if need be; exit 0 if every panel has data")
    what.add_argument("--down", action="store_true", help="end it")
    what.add_argument("--traffic", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        if options.traffic:
            asyncio.run(traffic(options.traffic))
        elif options.down:
            Stack().down()
        else:
            _up(is_check=options.check)
    except (StackError, ToolMissingError) as error:
        sys.exit(f"stack: {error}")


def _up(*, is_check: bool) -> None:
    stack = Stack()
    began = time.monotonic()
    if stack.is_up:
        print("it runs already:")
    else:
        stack.up()
        print(f"started in {time.monotonic() - began:.0f} s:")
    for what, where in stack.urls():
        print(f"  {what:18} {where}")
    if is_check:
        missing = stack.without_data()
        if missing:
            raise StackError("expected data in every panel, got none in\n  " + "\n  ".join(missing))
        print(f"every panel has data ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
