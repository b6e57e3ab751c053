"""A single Apache Kafka node on loopback, for tests, the demo and benchmarks: `python dev/kafka.py`.

The jars that dev/kafka-pom.xml names are fetched once, into .kafka/; after that nothing is downloaded any more.
"""

import argparse
import atexit
import contextlib
import fcntl
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POM = ROOT / "dev" / "kafka-pom.xml"
HOME = ROOT / ".kafka"
LIB = HOME / "lib"
CLASSES = HOME / "classes.jsa"  # Loaded classes, mapped by the JVM: a start takes 1 s with them, 3 s without.

FETCH_TIMEOUT = 600.0
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0

JAVA = (
    "java",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
log.dirs={logs}
# A client must never create a topic by accident, with the broker's defaults.
auto.create.topics.enable=false
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# One that was killed may register again when its session has ended (9 s by default).
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Tests look at what compaction and retention leave, and don't want to wait for it.
log.cleaner.backoff.ms=200
log.retention.check.interval.ms=500
log.initial.task.delay.ms=500
"""


class KafkaMissingError(RuntimeError):
    """A broker can't run on this machine; the text says what it needs."""


class Broker:
    """A broker that this process started. It keeps its ports and data over `kill`, `stop` and `restart`.

    With no `data` directory it has a temporary one, which `stop` removes. `settings` are further lines of
    server.properties.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int,
        controller: int,
        is_temporary: bool,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.address = f"127.0.0.1:{port}"
        self._directory = directory
        self._port = port
        self._controller = controller
        self._is_temporary = is_temporary
        self._settings = dict(settings or {})
        self._running: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, *, port: int | None = None, data: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> "Broker":
        """Return a broker that answers. Raises KafkaMissingError without Java or Maven, RuntimeError if it dies."""
        _fetch()
        directory = Path(tempfile.mkdtemp(prefix="kafka-")) if data is None else data.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        with _free_ports() as (first, second):
            broker = cls(directory, port=port or first, controller=second, is_temporary=data is None, settings=settings)
        atexit.register(broker.stop)
        try:
            broker.restart()
        except BaseException:
            broker.stop()
            raise
        return broker

    @property
    def pid(self) -> int | None:
        """The process's id, None while it's down."""
        return None if self._running is None else self._running.pid

    def restart(self, *jvm: str) -> None:
        """Start again (after a stop or a kill, or in place of what runs), and return when it answers.

        `jvm` are further options of the Java machine. After a kill the controller first has to miss the old
        broker: 3 s from its last heartbeat.
        """
        self._end(signal.SIGTERM)
        properties = self._directory / "server.properties"
        logs = self._directory / "logs"
        lines = [PROPERTIES.format(port=self._port, controller=self._controller, logs=logs)]
        lines += [f"{name}={value}\n" for name, value in self._settings.items()]
        properties.write_text("".join(lines))  # The last of two lines for one name holds.
        if not (logs / "meta.properties").exists():
            options = ("format", "--standalone", "-t", "gatewaygatewaygatewayg", "-c", str(properties))
            result = subprocess.run(
                [*_java(), "kafka.tools.StorageTool", *options], capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise RuntimeError(f"kafka format: expected it to succeed, got {result.stderr or result.stdout}")
        with (self._directory / "broker.log").open("ab") as output:
            self._running = subprocess.Popen(
                [*_java(), *jvm, "kafka.Kafka", str(properties)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """End it as a crash does: SIGKILL, at once."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang: it keeps its connections and answers nothing."""
        if self._running is not None:
            self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._running is not None:
            self._running.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, by SIGKILL if that takes too long, and remove a temporary directory."""
        atexit.unregister(self.stop)
        # What is thrown away needs no flushing.
        self._end(signal.SIGKILL if self._is_temporary else signal.SIGTERM)
        if self._is_temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    def wait(self) -> int:
        """Return the exit code when it ends by itself."""
        return 0 if self._running is None else self._running.wait()

    def _end(self, by: signal.Signals) -> None:
        process, self._running = self._running, None
        if process is None:
            return
        process.send_signal(by)
        if by is not signal.SIGKILL:
            process.send_signal(signal.SIGCONT)  # One that `pause` holds would not see it.
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_until_it_answers(self) -> None:
        give_up = time.monotonic() + START_TIMEOUT
        while time.monotonic() < give_up:
            if self._running is None or self._running.poll() is not None:
                raise RuntimeError(f"kafka on {self.address}: expected it to start, got {self._last_words()}")
            if _answers(self._port):
                return
            time.sleep(0.02)
        raise RuntimeError(f"kafka on {self.address}: expected an answer in {START_TIMEOUT:.0f} s, got none")

    def _last_words(self) -> str:
        return (self._directory / "broker.log").read_text(errors="replace")[-2000:]


def _answers(port: int) -> bool:
    # ApiVersions v0 with correlation id 1 and no client id: https://kafka.apache.org/protocol#The_Messages_ApiVersions
    request = bytes([0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 1, 0xFF, 0xFF])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            return len(connection.recv(4)) > 0
    except OSError:
        return False


@contextlib.contextmanager
def _free_ports() -> Iterator[tuple[int, int]]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        yield first.getsockname()[1], second.getsockname()[1]


def _java() -> list[str]:
    # -Xshare:auto ignores an archive that another version of Java wrote.
    archive = [f"-XX:SharedArchiveFile={CLASSES}", "-Xshare:auto", "-Xlog:disable"] if CLASSES.exists() else []
    return [*JAVA, "-cp", f"{LIB}/*", *archive]


def _fetch() -> None:
    """Make .kafka/lib what the pom says. Without a call of Maven where it already is."""
    if shutil.which("java") is None:
        raise KafkaMissingError(_missing("Java 17 or newer"))
    mark = HOME / "pom.xml"  # Written last: the libraries beside it are whole, and those of this pom.
    if mark.exists() and mark.read_bytes() == POM.read_bytes():
        return
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists() and mark.read_bytes() == POM.read_bytes():
            return
        if shutil.which("mvn") is None:
            raise KafkaMissingError(_missing("Maven (mvn), which fetches Kafka once,"))
        mark.unlink(missing_ok=True)
        CLASSES.unlink(missing_ok=True)
        shutil.rmtree(LIB, ignore_errors=True)
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={LIB}"]
        result = subprocess.run(
            ["mvn", "--batch-mode", "-q", "-f", str(POM), *goal],
            capture_output=True,
            text=True,
            check=False,
            timeout=FETCH_TIMEOUT,
        )
        if result.returncode:
            raise KafkaMissingError(_missing(f"the jars of dev/kafka-pom.xml, but mvn said: {result.stdout[-1000:]}"))
        _archive_classes()
        mark.write_bytes(POM.read_bytes())


def _archive_classes() -> None:
    """Run a broker once, which writes the classes that it loaded as it ends. Without them starts are only slower."""
    with tempfile.TemporaryDirectory(prefix="kafka-") as scratch:
        with _free_ports() as (port, controller):
            broker = Broker(Path(scratch), port=port, controller=controller, is_temporary=False)
        broker.restart(f"-XX:ArchiveClassesAtExit={CLASSES}", "-Xlog:disable")
        broker.stop()


def _missing(what: str) -> str:
    return f"kafka: expected {what} on this machine; or set GATEWAY_TEST_KAFKA=host:port to use a broker that runs"


def main() -> None:
    parser = argparse.ArgumentParser(description="run an Apache Kafka node on loopback until Ctrl-C")
    parser.add_argument("--port", type=int, default=9092)
    parser.add_argument("--data", type=Path, help="keep its data in this directory (default: a temporary one)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        broker = Broker.start(port=options.port, data=options.data)
    except (KafkaMissingError, RuntimeError) as error:
        sys.exit(str(error))
    print(broker.address, flush=True)
    try:
        sys.exit(broker.wait())
    except KeyboardInterrupt:
        pass
    finally:
        broker.stop()


if __name__ == "__main__":
    main()
