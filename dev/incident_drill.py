"""Stage an incident on a running gateway, for practice: `python dev/incident_drill.py NAME`. Without a name, list them.

A gateway with its rules, senders and destinations runs in a folder; a little later something goes wrong. The folder's
COMPLAINT.txt has what people report. Find the cause and fix it, with the gateway's commands, metrics, log and
documents (`. env.sh` first). Ctrl-C, or --minutes, ends the drill with its account: what should have arrived, and did.

Everything is on loopback and ends with the drill, except the folder.
"""

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, web

ROOT = Path(__file__).resolve().parent.parent
EVERY = 0.2
"""Seconds between two events of a sender."""
CALM = 10.0
"""Seconds without a fault, at the beginning."""
REPEAT = 5.0
"""Seconds after which a sender retries refused events, as providers do."""
START_TIMEOUT = 60.0
STOP_TIMEOUT = 40.0

RULES = """\
version: 1

sources:
  shop:
    verify: {{scheme: hmac, header: X-Shop-Signature, secrets: ["${{file:secrets/shop}}"]}}
    type: body.kind
    {identity}

destinations:
  billing:
    url: http://127.0.0.1:{billing}/in
    auth: {{bearer: {{token: "${{file:secrets/billing}}"}}}}
  warehouse:
    url: http://127.0.0.1:{warehouse}/in
  chat:
    url: http://127.0.0.1:{chat}/in
{more_destinations}
routes:
  - name: orders-to-warehouse
    from: shop
    match: {{type: {orders}}}
    to: warehouse
  - name: payments-to-billing
    from: shop
    match: {{type: payment.*}}
    to: billing
  - name: payments-to-chat
    from: shop
    match: {{type: payment.failed}}
    to: chat
    request:
      body: {{number: "${{{{ body.number }}}}", text: "{text}"}}
{more_routes}"""


@dataclass(kw_only=True)
class Destination:
    """A receiver, and its fault."""

    name: str
    port: int = 0
    """Chosen by the system at the start."""
    token: str | None = None
    behaviour: str = "well"
    got: Counter[int] = field(default_factory=Counter)
    """How often it accepted each event, by number."""

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.behaviour == "hangs":
            await asyncio.sleep(3600)
        if self.behaviour == "throttles":
            return web.Response(status=429, headers={"Retry-After": "7200"}, text="over quota, come back in two hours")
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text='{"error": "invalid_token"}')
        number = request.headers.get("X-Number") or json.loads(body)["number"]
        self.got[int(number)] += 1
        return web.Response(text="ok")


@dataclass(kw_only=True)
class Scene:
    """The parts of a drill: folder, senders, receivers."""

    folder: Path
    environ: dict[str, str]
    destinations: dict[str, Destination]
    rules: dict[str, str]
    secret: str = "secret-of-the-shop-0001"
    same_bodies: bool = False
    accepted: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Number → type and time of each acknowledged event."""
    began_at: float = 0.0
    refused: Counter[int] = field(default_factory=Counter)

    def write_rules(self, **changes: str) -> None:
        self.rules.update(changes)
        ports = {name: each.port for name, each in self.destinations.items()}
        staged = self.folder / "routes.new"
        staged.write_text(RULES.format(**{**ports, **self.rules}))
        staged.replace(self.folder / "routes.yaml")

    def write_secret(self, name: str, value: str) -> None:
        (self.folder / "secrets" / name).write_text(value)

    def command(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "gateway", *arguments], env=dict(self.environ), cwd=ROOT, check=True, timeout=60
        )

    def phone(self, name: str) -> bool:
        """Return whether a team was called: the file `call-NAME` exists."""
        return (self.folder / f"call-{name}").exists()


# What a type of event is expected at, by what each route is for.
EXPECTED: Mapping[str, Callable[[str], bool]] = {
    "warehouse": lambda kind: kind.startswith("order."),
    "billing": lambda kind: kind.startswith("payment."),
    "chat": lambda kind: kind == "payment.failed",
}


@dataclass(frozen=True, kw_only=True)
class Incident:
    """`stage` causes it, and returns the complaint once there is one."""

    name: str
    stage: Callable[[Scene], AsyncIterator[str]]
    expected: Mapping[str, Callable[[str], bool]]


INCIDENTS: dict[str, Incident] = {}


def incident(
    expected: Mapping[str, Callable[[str], bool]] = EXPECTED,
) -> Callable[[Callable[[Scene], AsyncIterator[str]]], Callable[[Scene], AsyncIterator[str]]]:
    def register(stage: Callable[[Scene], AsyncIterator[str]]) -> Callable[[Scene], AsyncIterator[str]]:
        name = stage.__name__.replace("_", "-")
        INCIDENTS[name] = Incident(name=name, stage=stage, expected=expected)
        return stage

    return register


@incident()
async def incident_1(scene: Scene) -> AsyncIterator[str]:
    """The credentials at a destination are rotated."""
    await asyncio.sleep(CALM)
    scene.destinations["billing"].token = "token-of-billing-0002"
    scene.write_secret("billing.new", "token-of-billing-0002")
    await asyncio.sleep(30)
    yield (
        "The billing team: for half a minute or so no payment has arrived. We changed nothing but our monthly chores. "
        "(If anybody needs it, our new token is in secrets/billing.new.)"
    )


@incident()
async def incident_2(scene: Scene) -> AsyncIterator[str]:
    """The secret of a sender is rotated."""
    await asyncio.sleep(CALM)
    scene.secret = "secret-of-the-shop-0002"
    scene.write_secret("shop.new", scene.secret)
    await asyncio.sleep(20)
    yield (
        "The shop's team: our log is full of failed webhooks. They are sent again, so nothing is gone yet. "
        "(What we sign with now is in secrets/shop.new; there may be stragglers with the old one.)"
    )


@incident(expected={**EXPECTED, "audit": lambda kind: kind.startswith("order.")})
async def incident_3(scene: Scene) -> AsyncIterator[str]:
    """A rule file is refused."""
    await asyncio.sleep(CALM)
    audit = scene.destinations["audit"]
    scene.began_at = time.time()
    scene.write_rules(
        text="Payment ${{ body.number }} failed: ${{ body.reason",
        more_destinations=f"  audit:\n    url: http://127.0.0.1:{audit.port}/in\n",
        more_routes="  - name: orders-to-audit\n    from: shop\n    match: {type: order.*}\n    to: audit\n",
    )
    await asyncio.sleep(20)
    yield (
        "The audit team: our route (orders-to-audit) was merged and rolled out some 20 seconds ago, and we get "
        "nothing. We need every order since then."
    )


@incident()
async def incident_4(scene: Scene) -> AsyncIterator[str]:
    """A condition is mistyped."""
    await asyncio.sleep(CALM)
    scene.write_rules(orders="orders.*")
    await asyncio.sleep(25)
    yield "The warehouse: since a change of the rules 25 seconds ago, we get no orders. We need what we missed, once."


@incident()
async def incident_5(scene: Scene) -> AsyncIterator[str]:
    """A destination hangs."""
    await asyncio.sleep(CALM)
    scene.destinations["warehouse"].behaviour = "hangs"
    await asyncio.sleep(30)
    yield (
        "Operations of the shop: orders don't reach the warehouse, the gateway must be stuck. "
        "(A team is called by creating the file call-TEAM; they fix what is theirs within seconds.)"
    )
    while not scene.phone("warehouse"):  # noqa: ASYNC110 - a file that somebody makes
        await asyncio.sleep(0.5)
    await asyncio.sleep(2)
    scene.destinations["warehouse"].behaviour = "well"


@incident()
async def incident_6(scene: Scene) -> AsyncIterator[str]:
    """A Retry-After outlives its cause."""
    await asyncio.sleep(CALM)
    scene.destinations["billing"].behaviour = "throttles"
    await asyncio.sleep(5)
    scene.destinations["billing"].behaviour = "well"
    await asyncio.sleep(15)
    yield "The billing team: we had a short quota problem, over for 15 seconds by now, and still no payment comes in."


@incident()
async def incident_7(scene: Scene) -> AsyncIterator[str]:
    """An expression fails on some events."""
    await asyncio.sleep(CALM)
    scene.write_rules(text="Payment of ${{ body.customer.email }} failed")
    await asyncio.sleep(25)
    yield "Support, in the chat: some failed payments aren't announced any more, others are. We need all of them."


@incident()
async def incident_8(scene: Scene) -> AsyncIterator[str]:
    """A pause is forgotten."""
    await asyncio.sleep(CALM)
    await asyncio.to_thread(scene.command, "route", "pause", "orders-to-warehouse")
    await asyncio.sleep(25)
    yield "The warehouse: no orders. Our maintenance ended long ago, everything is green on our side."


@incident()
async def incident_9(scene: Scene) -> AsyncIterator[str]:
    """Distinct events have the same identity."""
    await asyncio.sleep(CALM)
    scene.same_bodies = True
    scene.write_rules(identity="id: body.customer.id\n    dedupe: 1h")
    await asyncio.sleep(25)
    yield (
        "The warehouse: some orders arrive, most don't, and the shop shows us 202 for every one of them. "
        "(The shop: since our last release, an order is told from another by the header X-Number; the body may repeat.)"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python dev/incident_drill.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", nargs="?", choices=list(INCIDENTS))
    parser.add_argument("--folder", type=Path, help="where it plays; a new one of its own by default")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which it ends by itself")
    parser.add_argument("--log", default=None, help="kafka://host:port; an embedded log by default")
    arguments = parser.parse_args()
    if arguments.name is None:
        sys.stdout.write("".join(f"{name}\n" for name in INCIDENTS))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="gateway-drill-"))
    folder.mkdir(parents=True, exist_ok=True)
    await play(INCIDENTS[arguments.name], folder.resolve(), arguments.log, arguments.minutes * 60)


async def play(staged: Incident, folder: Path, log: str | None, seconds: float) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    names = ("billing", "warehouse", "chat", "audit")
    scene = Scene(
        folder=folder,
        environ={
            **os.environ,
            "GATEWAY_LOG": log or f"sqlite:///{folder / 'gateway.db'}",
            "GATEWAY_RULES": str(folder / "routes.yaml"),
            "GATEWAY_LISTEN": "127.0.0.1:0",
            "GATEWAY_ADMIN": "127.0.0.1:0",
            "GATEWAY_DEV": "1",
        },
        destinations={name: Destination(name=name) for name in names},
        rules={
            "identity": "",
            "orders": "order.*",
            "text": "Payment ${{ body.number }} failed: ${{ body.reason }}",
            "more_destinations": "",
            "more_routes": "",
        },
    )
    (folder / "secrets").mkdir(exist_ok=True)
    scene.write_secret("shop", scene.secret)
    scene.write_secret("billing", "token-of-billing-0001")
    scene.destinations["billing"].token = "token-of-billing-0001"
    async with served(scene.destinations.values()):
        scene.write_rules()
        async with gateway(scene):
            settings = "".join(
                f"export {key}={value!r}\n" for key, value in scene.environ.items() if key.startswith("GATEWAY_")
            )
            (folder / "env.sh").write_text(f"{settings}export PATH={Path(sys.executable).parent}:$PATH\ncd {folder}\n")
            sys.stdout.write(f"{folder}: it runs; wait for COMPLAINT.txt, then `. {folder}/env.sh`\n")
            sys.stdout.flush()
            sending = asyncio.create_task(send(scene), name="send")
            staging = asyncio.create_task(stage(staged, scene), name="stage")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await ended.wait()
            for task in (sending, staging):
                task.cancel()
            await asyncio.wait((sending, staging))
            await asyncio.sleep(2)  # what was accepted last is on its method
    told = account(staged, scene)
    (folder / "account.txt").write_text(told)
    sys.stdout.write(told)


async def stage(staged: Incident, scene: Scene) -> None:
    async for said in staged.stage(scene):
        (scene.folder / "COMPLAINT.txt").write_text(said + "\n")


async def send(scene: Scene) -> None:
    """Send events, and retry refused ones."""
    kinds = itertools.cycle(("order.created", "payment.failed", "order.paid", "payment.received"))
    to_send: dict[int, tuple[str, bytes]] = {}
    due: list[tuple[float, int]] = []
    numbers = itertools.count()
    async with ClientSession(timeout=ClientTimeout(total=10)) as session:
        while True:
            number, kind = next(numbers), next(kinds)
            to_send[number] = kind, body_of(scene, number, kind)
            due.append((time.monotonic(), number))
            now = time.monotonic()
            for at, late in [each for each in due if each[0] <= now]:
                due.remove((at, late))
                kind, body = to_send[late]
                if await is_accepted(scene, session, late, body):
                    scene.accepted[late] = kind, time.time()
                    del to_send[late]
                else:
                    due.append((now + REPEAT, late))
            await asyncio.sleep(EVERY)


def body_of(scene: Scene, number: int, kind: str) -> bytes:
    customer: dict[str, object] = {"id": f"c{number // 4 % 5}"}
    if number % 3:
        customer["email"] = f"{customer['id']}@example.com"
    body: dict[str, object] = {"kind": kind, "customer": customer, "reason": "card_declined", "number": number}
    if scene.same_bodies and kind.startswith("order."):
        del body["number"]
        body["customer"] = {"id": customer["id"]}
    return json.dumps(body).encode()


async def is_accepted(scene: Scene, session: ClientSession, number: int, body: bytes) -> bool:
    signature = hmac.new(scene.secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-Shop-Signature": signature, "X-Number": str(number), "Content-Type": "application/json"}
    address = f"http://{scene.environ['GATEWAY_LISTEN']}/in/shop"
    try:
        async with session.post(address, data=body, headers=headers) as answer:
            await answer.read()
            if answer.status == web.HTTPAccepted.status_code:
                return True
            scene.refused[answer.status] += 1
    except (ClientError, TimeoutError):
        pass
    return False


@asynccontextmanager
async def served(destinations: Collection[Destination]) -> AsyncIterator[None]:
    runners = []
    for destination in destinations:
        application = web.Application()
        application.router.add_post("/in", destination.take)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        destination.port = runner.addresses[0][1]
        runners.append(runner)
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


@asynccontextmanager
async def gateway(scene: Scene) -> AsyncIterator[None]:
    """Run a gateway on ports that the system chooses, as a free port may be taken by another drill."""
    file = scene.folder / "gateway.log"
    begin = file.stat().st_size if file.exists() else 0
    with file.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            "run",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(scene.environ),
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is the drill's
        )
    try:
        scene.environ |= await addresses(process, file, begin)
        yield
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()


async def addresses(process: asyncio.subprocess.Process, file: Path, begin: int) -> dict[str, str]:
    """Return a gateway's addresses, once its log has them after `begin`."""
    async with asyncio.timeout(START_TIMEOUT):
        while process.returncode is None:
            written = (await asyncio.to_thread(file.read_bytes))[begin:]
            for line in written.rpartition(b"\n")[0].splitlines():
                if b'"event":"listening"' in line:
                    told = json.loads(line)
                    where = {"GATEWAY_LISTEN": told["ingress"], "GATEWAY_ADMIN": told["admin"]}
                    return {name: address.removeprefix("http://") for name, address in where.items()}
            await asyncio.sleep(EVERY)
    message = f"expected a gateway that listens, got one that ended: {file}"
    raise RuntimeError(message)


def account(staged: Incident, scene: Scene) -> str:
    """Return what should have arrived, and what did."""
    lines = [f"{staged.name}: {staged.stage.__doc__}"]
    missing: defaultdict[str, list[int]] = defaultdict(list)
    for name, is_for in staged.expected.items():
        got = scene.destinations[name].got
        expected = [
            number
            for number, (kind, at) in scene.accepted.items()
            if is_for(kind) and (name != "audit" or at >= scene.began_at)
        ]
        missing[name] = [number for number in expected if number not in got]
        repeated = sum(count - 1 for count in got.values())
        lines.append(f"{name:10} expected {len(expected)}, missing {len(missing[name])}, repeated {repeated}")
    lines.append(f"accepted {len(scene.accepted)}, refused {dict(scene.refused)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    asyncio.run(main())
