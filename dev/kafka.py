"""Apache Kafka on loopback, for tests, the demo and benchmarks: `python dev/kafka.py`, or a cluster of three nodes.

The jars that dev/broker/pom.xml names are fetched once, into .kafka/; after that nothing is downloaded any more.
"""

import argparse
import asyncio
import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Response
from aiokafka.protocol.metadata import MetadataRequest

ROOT = Path(__file__).resolve().parent.parent
POM = ROOT / "dev" / "broker" / "pom.xml"
HOME = ROOT / ".kafka"
LIB = HOME / "lib"
CLASSES = HOME / "classes.jsa"  # Loaded classes, mapped by the JVM: a start takes 1 s with them, 3 s without.

FETCH_TIMEOUT = 600.0
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
WHOLE_TIMEOUT = 60.0
NODES = (1, 2, 3)

JAVA = (
    "java",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

PROPERTIES = """\
process.roles=broker,controller
node.id={node}
listeners={listeners},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={listeners}
listener.security.protocol.map={protocols},CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
{quorum}
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
# Tests look at what compaction and retention leave, and don't want to wait for it. But each look is at every partition,
# and the broker of a run has thousands.
log.cleaner.backoff.ms=1000
log.retention.check.interval.ms=1000
log.initial.task.delay.ms=500
"""

# Of a node of three: what the promises need (https://kafka.apache.org/documentation/#producerconfigs_acks), and little
# memory. Several partitions of the groups' topic, so that the groups have several coordinators.
REPLICATED = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.num.partitions": "6",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    # Who lags for that long is out of the in-sync replicas; the default is 30 s.
    "replica.lag.time.max.ms": "5000",
}
SMALL = ("-Xmx384m",)


class KafkaMissingError(RuntimeError):
    """A broker can't run on this machine; the text says what it needs."""


class Broker:
    """A broker that this process started. It keeps its ports and data over `kill`, `end` and `restart`.

    With no `data` directory it has a temporary one, which `stop` removes. `settings` are further lines of
    server.properties, `jvm` further options of the Java machine. `voters` are the controllers of a cluster, one of
    which it is; without them it is alone. `listeners` are further ones, beside the plain one of `address`: name →
    security protocol; `port_of` tells where each is. `users` have passwords for SCRAM.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int,
        controller: int,
        is_temporary: bool,
        settings: Mapping[str, str] | None = None,
        jvm: tuple[str, ...] = (),
        node: int = 1,
        voters: Mapping[int, int] | None = None,
        listeners: Mapping[str, tuple[str, int]] | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.node = node
        self.address = f"127.0.0.1:{port}"
        self._directory = directory
        self._port = port
        self._controller = controller
        self._is_temporary = is_temporary
        self._settings = dict(settings or {})
        self._jvm = jvm
        self._voters = voters
        self._listeners = {"PLAINTEXT": ("PLAINTEXT", port), **(listeners or {})}
        self._users = dict(users or {})
        self._running: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        *,
        port: int | None = None,
        data: Path | None = None,
        settings: Mapping[str, str] | None = None,
        jvm: tuple[str, ...] = (),
        listeners: Mapping[str, str] | None = None,
        users: Mapping[str, str] | None = None,
    ) -> "Broker":
        """Return a broker that responds. Raises KafkaMissingError without Java or Maven, RuntimeError if it dies."""
        _fetch()
        directory = Path(tempfile.mkdtemp(prefix="kafka-")) if data is None else data.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        protocols = dict(listeners or {})
        with _free_ports(2 + len(protocols)) as (first, second, *others):
            broker = cls(
                directory,
                port=port or first,
                controller=second,
                is_temporary=data is None,
                settings=settings,
                jvm=jvm,
                listeners={
                    name: (protocol, where) for (name, protocol), where in zip(protocols.items(), others, strict=True)
                },
                users=users,
            )
        atexit.register(broker.stop)
        try:
            broker.restart()
        except BaseException:
            broker.stop()
            raise
        return broker

    def port_of(self, listener: str) -> int:
        """Return the port of a listener, by its name."""
        return self._listeners[listener][1]

    def segment_of(self, topic: str, partition: int) -> Path:
        """Return the file that has a partition's first records, of a topic that isn't old."""
        [segment] = self._directory.rglob(f"{topic}-{partition}/{0:020}.log")
        return segment

    @property
    def pid(self) -> int | None:
        """The process ID, None while it's down."""
        return None if self._running is None else self._running.pid

    def restart(self, *jvm: str) -> None:
        """Start again (after an end or a kill, or in place of what runs), and return when it answers.

        `jvm` are further options of the Java machine. After a kill the controller first has to miss the old
        broker: 3 s from its last heartbeat.
        """
        self.launch(*jvm)
        self.wait_until_it_answers()

    def launch(self, *jvm: str) -> None:
        """Start again, without waiting."""
        self._end(signal.SIGTERM)
        properties = self._directory / "server.properties"
        logs = self._directory / "logs"
        if self._voters is None:
            quorum, membership = f"controller.quorum.bootstrap.servers=127.0.0.1:{self._controller}", ["--standalone"]
        else:
            voters = ",".join([f"{node}@127.0.0.1:{port}" for node, port in self._voters.items()])
            quorum, membership = f"controller.quorum.voters={voters}", []
        listeners = self._listeners.items()
        lines = [
            PROPERTIES.format(
                node=self.node,
                listeners=",".join([f"{name}://127.0.0.1:{port}" for name, (_, port) in listeners]),
                protocols=",".join([f"{name}:{protocol}" for name, (protocol, _) in listeners]),
                controller=self._controller,
                quorum=quorum,
                logs=logs,
            )
        ]
        lines += [f"{name}={value}\n" for name, value in self._settings.items()]
        properties.write_text("".join(lines))  # The last of two lines for one name holds.
        if not (logs / "meta.properties").exists():
            users = [
                f"--add-scram={mechanism}=[name={user},password={password}]"
                for user, password in self._users.items()
                for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            ]
            options = ("format", *membership, *users, "-t", "gatewaygatewaygatewayg", "-c", str(properties))
            result = subprocess.run(
                [*_java(), "kafka.tools.StorageTool", *options], capture_output=True, text=True, check=False
            )
            if result.returncode:
                raise RuntimeError(f"kafka format: expected it to succeed, got {result.stderr or result.stdout}")
        with (self._directory / "broker.log").open("ab") as output:
            self._running = subprocess.Popen(
                [*_java(), *self._jvm, *jvm, "kafka.Kafka", str(properties)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def kill(self) -> None:
        """Kill it, like a crash."""
        self._end(signal.SIGKILL)

    def end(self) -> None:
        """Stop it gracefully: in a cluster it hands over its leaderships first."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freeze it: it keeps its connections and answers nothing."""
        if self._running is not None:
            self._running.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._running.pid, os.WSTOPPED | os.WNOWAIT)  # every thread of it stands

    def resume(self) -> None:
        if self._running is not None:
            self._running.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it for good, by SIGKILL if a graceful stop takes too long, and remove a temporary directory."""
        atexit.unregister(self.stop)
        # What is thrown away needs no flushing.
        self._end(signal.SIGKILL if self._is_temporary else signal.SIGTERM)
        if self._is_temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    def wait(self) -> int:
        """Return the exit code when it ends by itself."""
        return 0 if self._running is None else self._running.wait()

    def wait_until_it_answers(self) -> None:
        """Return when it answers. Raises RuntimeError, with its last words, when it ends instead or takes too long."""
        give_up = time.monotonic() + START_TIMEOUT
        while time.monotonic() < give_up:
            if self._running is None or self._running.poll() is not None:
                raise RuntimeError(f"kafka on {self.address}: expected it to start, got {self._last_words()}")
            if _answers(self._port) and all(_listens(port) for _, port in self._listeners.values()):
                return
            time.sleep(0.02)
        raise RuntimeError(f"kafka on {self.address}: expected an answer in {START_TIMEOUT:.0f} s, got none")

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

    def _last_words(self) -> str:
        return (self._directory / "broker.log").read_text(errors="replace")[-2000:]


class Cluster:
    """Three nodes, each a broker and a controller, as production has them: replication 3, min.insync.replicas 2.

    `nodes` are killed, ended, paused and restarted one by one; `heal` undoes all of that. Of two that are killed the
    third can't tell the controllers, which have lost their majority: it stays as it is until one is back. Two that are
    *ended* leave the in-sync replicas first.
    """

    def __init__(self, nodes: Mapping[int, Broker], directory: Path) -> None:
        self.nodes = nodes
        self.address = ",".join([node.address for node in nodes.values()])
        self._directory = directory

    @classmethod
    def start(cls) -> "Cluster":
        """Return a cluster that responds, in a temporary directory. Raises as `Broker.start` does."""
        _fetch()
        directory = Path(tempfile.mkdtemp(prefix="kafka-"))
        with _free_ports(2 * len(NODES)) as ports:
            clients, controllers = ports[: len(NODES)], ports[len(NODES) :]
        voters = dict(zip(NODES, controllers, strict=True))
        nodes: dict[int, Broker] = {}
        for node, port in zip(NODES, clients, strict=True):
            (directory / str(node)).mkdir()
            nodes[node] = Broker(
                directory / str(node),
                port=port,
                controller=voters[node],
                is_temporary=True,
                settings=REPLICATED,
                jvm=SMALL,
                node=node,
                voters=voters,
            )
        cluster = cls(nodes, directory)
        atexit.register(cluster.stop)
        try:
            cluster.heal()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def heal(self) -> None:
        """Start stopped nodes and resume paused ones; return when each node responds."""
        for node in self.nodes.values():
            node.resume()
            if node.pid is None:
                node.launch()
        for node in self.nodes.values():
            node.wait_until_it_answers()

    def stop(self) -> None:
        """End it for good, and remove its data."""
        atexit.unregister(self.stop)
        for node in self.nodes.values():
            node.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def leader(self, topic: str, partition: int) -> Broker:
        """Return the node that leads a partition, once there is one."""

        async def ask(admin: AIOKafkaAdminClient) -> int:
            [described] = await admin.describe_topics([topic])
            [leader] = [each["leader"] for each in described["partitions"] if each["partition"] == partition]
            return int(leader)

        return await self._node(ask)

    async def coordinator(self, group: str) -> Broker:
        """Return the node that coordinates a group, once there is one."""
        return await self._node(lambda admin: admin.find_coordinator(group))

    async def committed(self, group: str) -> int:
        """Return the sum of the offsets that a group has committed, once there is a coordinator to say so."""
        give_up = time.monotonic() + WHOLE_TIMEOUT
        while True:
            try:
                async with self._admin() as admin:
                    found = await admin.list_consumer_group_offsets(group)
                    return sum([each.offset for each in found.values()])
            except (KafkaError, OSError):
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(0.1)

    async def members(self, group: str) -> set[str]:
        """Return the ids of a group's members."""
        async with self._admin() as admin:
            [answer] = await admin.describe_consumer_groups([group])
            [described] = answer.to_object()["groups"]
            return {member["member_id"] for member in described["members"]}

    async def until_whole(self) -> None:
        """Wait until each partition has a leader and all its replicas are in sync.

        Every node has to say so: one that was paused knows for a while only what was before.
        """
        give_up = time.monotonic() + WHOLE_TIMEOUT
        lagging = ["everything"]
        while time.monotonic() < give_up:
            with contextlib.suppress(KafkaError, OSError):
                answers = await self._metadata_of_each_node()
                lagging = [
                    f"{topic['topic']}/{each['partition']}"
                    for answer in answers
                    for topic in answer.to_object()["topics"]
                    for each in topic["partitions"]
                    if each["leader"] < 0 or len(each["isr"]) < len(each["replicas"])
                ]
                if not lagging:
                    return
            await asyncio.sleep(0.3)
        raise RuntimeError(
            f"kafka: expected every replica in sync in {WHOLE_TIMEOUT:.0f} s, got {lagging[:3]} out of it"
        )

    async def _metadata_of_each_node(self) -> list[Response]:
        client = AIOKafkaClient(bootstrap_servers=self.address, request_timeout_ms=5000)
        await client.bootstrap()
        try:
            return [await client.send(node, MetadataRequest(None)) for node in self.nodes]
        finally:
            await client.close()

    async def _node(self, ask: Callable[[AIOKafkaAdminClient], Awaitable[int]]) -> Broker:
        give_up = time.monotonic() + WHOLE_TIMEOUT
        while time.monotonic() < give_up:
            with contextlib.suppress(KafkaError, OSError):
                async with self._admin() as admin:
                    if (number := await ask(admin)) in self.nodes:
                        return self.nodes[number]
            await asyncio.sleep(0.2)
        raise RuntimeError(f"kafka: expected a node to be found in {WHOLE_TIMEOUT:.0f} s, got none")

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address, request_timeout_ms=5000)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


def _answers(port: int) -> bool:
    # ApiVersions v0 with correlation id 1 and no client id: https://kafka.apache.org/protocol#The_Messages_ApiVersions
    request = bytes([0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 1, 0xFF, 0xFF])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            return len(connection.recv(4)) > 0
    except OSError:
        return False


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]


def _java() -> list[str]:
    # -Xshare:auto ignores an archive that another version of Java wrote.
    archive = [f"-XX:SharedArchiveFile={CLASSES}", "-Xshare:auto", "-Xlog:disable"] if CLASSES.exists() else []
    return [*JAVA, "-cp", f"{LIB}/*", *archive]


def _fetch() -> None:
    """Fill .kafka/lib as the pom says; without Maven if it is up to date."""
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
            raise KafkaMissingError(_missing(f"the jars of dev/broker/pom.xml, but mvn said: {result.stdout[-1000:]}"))
        _archive_classes()
        mark.write_bytes(POM.read_bytes())


def _archive_classes() -> None:
    """Run a broker once, which writes the classes that it loaded at its end. They only make starts faster."""
    with tempfile.TemporaryDirectory(prefix="kafka-") as scratch:
        with _free_ports(2) as (port, controller):
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
