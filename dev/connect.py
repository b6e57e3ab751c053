"""Kafka Connect on loopback, for the tests of deploy/connect: one worker that runs connectors until it is stopped.

The jars that dev/connect/pom.xml names are fetched once, into .kafka/connect/.
"""

import fcntl
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dev.kafka import FETCH_TIMEOUT, HOME, KafkaMissingError  # noqa: E402 - found by the line above

POM = ROOT / "dev" / "connect" / "pom.xml"
LIB = HOME / "connect" / "lib"
JAVA = ("java", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
STOP_TIMEOUT = 15.0
Properties = Mapping[str, str]


class Worker:
    """A standalone worker. `stop` ends it."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        """Used by `run`."""
        self._process = process
        self._output = output

    @classmethod
    def run(cls, folder: Path, worker: Properties, connectors: Sequence[Properties]) -> "Worker":
        """Start a worker with these settings and connectors; `folder` keeps its files.

        Raises KafkaMissingError without Java or Maven.
        """
        fetch()
        files = [folder / "worker.properties", *[folder / f"{each['name']}.properties" for each in connectors]]
        for file, properties in zip(files, (worker, *connectors), strict=True):
            file.write_text("".join([f"{name}={escaped(value)}\n" for name, value in properties.items()]))
        output = folder / "worker.log"
        main = "org.apache.kafka.connect.cli.ConnectStandalone"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*JAVA, "-cp", f"{LIB}/*", main, *map(str, files)], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        return cls(process, output)

    def wait_until(self, holds: Callable[[], bool], timeout: float) -> None:
        """Return once it holds. Raises RuntimeError, with what the worker says, if that takes too long or it ends."""
        give_up = time.monotonic() + timeout
        while not holds():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"connect: expected it to write, got {self.said()[-6000:]}")
            time.sleep(0.2)

    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def stop(self) -> None:
        """End it; what it has read and not committed is read again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def read_properties(file: Path) -> dict[str, str]:
    """Return the settings of a file of properties, as far as ours go: a line each, without a continuation."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.partition("=") for line in lines]
    return {name.strip(): value.strip().replace("\\\\", "\\") for name, _, value in pairs}


def escaped(value: str) -> str:
    """Return a value as a file of properties has it."""
    return value.replace("\\", "\\\\")


def fetch() -> None:
    """Fill .kafka/connect/lib as the pom says; without Maven if it is up to date."""
    if shutil.which("java") is None:
        raise KafkaMissingError("connect: expected Java 17 or newer on this machine")
    mark = LIB.parent / "pom.xml"  # written last, as for the broker
    LIB.parent.mkdir(parents=True, exist_ok=True)
    with (LIB.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists() and mark.read_bytes() == POM.read_bytes():
            return
        if shutil.which("mvn") is None:
            raise KafkaMissingError("connect: expected Maven (mvn), which fetches Kafka Connect once, on this machine")
        mark.unlink(missing_ok=True)
        shutil.rmtree(LIB, ignore_errors=True)
        result = subprocess.run(
            ["mvn", "-B", "-q", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={LIB}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=FETCH_TIMEOUT,
        )
        if result.returncode:
            raise KafkaMissingError(f"connect: expected the jars of dev/connect/pom.xml, got {result.stdout[-1000:]}")
        mark.write_bytes(POM.read_bytes())
