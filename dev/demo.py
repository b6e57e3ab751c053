"""Show the gateway at work: signed events in, delivered, retried, dead-lettered, replayed. `make demo` runs this.

Everything is real: `gateway run` with the repository's routes.yaml, receivers and senders are the gateway's own
commands in processes of their own, on loopback.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
GATEWAY = (sys.executable, "-m", "gateway")
SECRETS = {
    "GITHUB_WEBHOOK_SECRET": "It's a Secret to Everybody",
    "STRIPE_SECRET": "whsec_demo_secret_of_the_stripe_endpoint",
}
QUERY = "body.data.object.customer_email:jenny.rosen@example.com route:announce-failed-payments"
console = Console(highlight=False, soft_wrap=True)


class Process:
    """A command of the gateway that runs next to the demo, with its output in a file."""

    def __init__(self, *arguments: str, folder: Path, name: str, environ: dict[str, str]) -> None:
        self.output = folder / f"{name}.log"
        with self.output.open("wb") as sink:
            self._process = subprocess.Popen([*GATEWAY, *arguments], stdout=sink, stderr=sink, env=environ, cwd=ROOT)

    def lines(self) -> list[dict[str, Any]]:
        text = self.output.read_text(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def wait_for(self, what: str, count: int = 1, seconds: float = 30, **fields: object) -> dict[str, Any]:
        """Return the `count`-th line with these fields, as soon as it is printed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = [line for line in self.lines() if fields.items() <= line.items()]
            if len(found) >= count:
                return found[count - 1]
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        console.print(self.output.read_text(errors="replace")[-3000:], style="dim")
        raise SystemExit(f"demo: expected {what} within {seconds:g} s")

    def stop(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", choices=("embedded", "kafka"), default="embedded")
    log = parser.parse_args().log
    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-demo-")))
        address = stack.enter_context(_log_address(log, folder))
        demo(stack, folder, address)
    console.print(f"\n[dim]{time.monotonic() - began:.0f} s. Everything that was started has been stopped.[/]")


def demo(stack: ExitStack, folder: Path, log: str) -> None:
    ingress, admin, ci, chat = _free_ports(4)
    environ = {
        **os.environ,
        **SECRETS,
        "CI_URL": f"http://127.0.0.1:{ci}/hooks/github",
        "CHAT_URL": f"http://127.0.0.1:{chat}/services/alerts",
        "GATEWAY_LOG": log,
        "GATEWAY_LISTEN": f"127.0.0.1:{ingress}",
        "GATEWAY_ADMIN": f"127.0.0.1:{admin}",
        "GATEWAY_DEV": "1",
        "GATEWAY_INDEX": str(folder / "index.db"),
        "PYTHONWARNINGS": "ignore",
    }

    def start(*arguments: str, name: str) -> Process:
        process = Process(*arguments, folder=folder, name=name, environ=environ)
        stack.callback(process.stop)
        return process

    def send(source: str, sample: str, *arguments: str) -> None:
        path = "/in/stripe" if source == "billing" else f"/in/{source}"
        url = f"http://127.0.0.1:{ingress}{path}"
        command = ["send", source, "--url", url, *arguments, f"samples/{sample}"]
        _show(f"gateway {' '.join(command[:2])} {' '.join(arguments)} samples/{sample}")
        subprocess.run([*GATEWAY, *command], env=environ, cwd=ROOT, check=False)

    def run(*arguments: str) -> None:
        _show(f"gateway {shlex.join(arguments)}")
        subprocess.run([*GATEWAY, *arguments], env=environ, cwd=ROOT, check=True)

    _step("The rules", "two routes of routes.yaml are at work: a push goes to `ci`, a failed payment to `chat`")
    run("check", "routes.yaml")

    _step("Start", f"the gateway on {log.partition(':')[0]}; `ci` answers 503 twice, `chat` is down")
    gateway = start("run", "--rules", "routes.yaml", name="gateway")
    secret = "whsec_Z2F0ZXdheS1kZW1vLXNpZ25pbmctc2VjcmV0"
    receiver = start("receive", "--port", str(ci), "--respond", "503,503,200", "--secret", secret, "--json", name="ci")
    ready = gateway.wait_for("the gateway to listen", event="listening", seconds=40)
    _wait_until_open(ci)
    console.print(f"  listening at {ready['ingress']}, metrics at {ready['admin']}/metrics")

    _step("Send", "real payloads, signed as GitHub and Stripe sign them; the last one is a forgery")
    send("github", "github.push.json", "--type", "push")
    send("billing", "stripe.invoice.payment_failed.json")
    send("github", "github.push.json", "--type", "push", "--forge")

    _step("Deliver", "`ci` gets the push at the third try, `chat` is tried three times")
    finished = gateway.wait_for("the push to be delivered", event="delivery_finished", destination="ci")
    for line in receiver.lines():
        if "attempt" in line:
            console.print(f"  ci    attempt {line['attempt']}: answered {line['status']}, signature {_sign(line)}")
    _say(finished)
    _say(gateway.wait_for("the dead letter", event="delivery_finished", destination="chat"))

    _step("Dead letter", "kept with every attempt, until someone replays or drops it")
    run("dead", "list")

    _step("Replay", "`chat` is up again")
    again = start("receive", "--port", str(chat), "--json", name="chat")
    _wait_until_open(chat)
    run("dead", "replay", "--route", "announce-failed-payments")
    _say(gateway.wait_for("the replay", event="delivery_finished", destination="chat", outcome="delivered"))
    message = next(line for line in again.lines() if "attempt" in line)
    console.print(f"  chat  got {message.get('body', '')}")
    run("dead", "list")

    _step("Search", "the gateway has kept an index of its log, too: events are found by what is in their bodies")
    run("events", "search", _indexed(QUERY, environ))

    _end(gateway)


def _end(gateway: Process) -> None:
    _step("Stop", "SIGTERM: what is under way ends, what is done is committed")
    code = gateway.stop()
    console.print(f"  exit code {code}")
    if code:
        raise SystemExit(1)
    console.print(
        "\n[bold]Where to look next[/]\n"
        "  README.md         your own first route, in five minutes\n"
        "  routes.yaml       the rules that just ran\n"
        "  docs/console.md   the same in a browser: gateway run --dev --index index.db, then http://127.0.0.1:9090/ui\n"
        "  docs/search.md    the index, of a gateway of yours: gateway events search 'status:dead,retrying since:1h'\n"
        "  gateway explain routes.yaml --source github --header 'X-GitHub-Event: push' samples/github.push.json\n"
        "  ARCHITECTURE.md   what a crash at each step does, and why nothing is lost"
    )


@contextmanager
def _log_address(log: str, folder: Path) -> Iterator[str]:
    if log == "embedded":
        yield f"sqlite:///{folder / 'gateway.db'}"
        return
    sys.path.insert(0, str(ROOT))
    from dev.kafka import Broker  # noqa: PLC0415 - Java is needed only here

    with console.status("starting Apache Kafka (the first time, Maven fetches it)"):
        broker = Broker.start()
    try:
        yield f"kafka://{broker.address}"
    finally:
        broker.stop()


def _indexed(query: str, environ: dict[str, str], seconds: float = 30) -> str:
    """Return the query once it finds something: the index is a second or two behind."""
    until = time.monotonic() + seconds
    search = [*GATEWAY, "events", "search", "--json", query]
    while time.monotonic() < until:
        told = subprocess.run(search, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        if any("id" in json.loads(line) for line in told.stdout.splitlines()):
            return query
        time.sleep(0.5)
    raise SystemExit(f"demo: expected {query} to find something within {seconds:g} s")


def _say(line: dict[str, Any]) -> None:
    reason = f" ({line['reason']}: {line['detail']})" if "reason" in line else ""
    attempts = (
        "" if " after " in reason else f" after {line['attempts']} {'attempt' if line['attempts'] == 1 else 'attempts'}"
    )
    console.print(
        f"  [bold]{line['outcome']}[/]{reason} to {line['destination']} by {line['route']}"
        f"{attempts}, {line['seconds']:.1f} s after its receipt"
    )


def _sign(line: dict[str, Any]) -> str:
    return "verified" if line.get("verified") else "wrong"


def _step(title: str, text: str) -> None:
    console.print(f"\n[bold cyan]{title}[/]  {text}")


def _show(command: str) -> None:
    console.print(f"[dim]$ {' '.join(command.split())}[/]")
    sys.stdout.flush()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def _wait_until_open(port: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"demo: expected a receiver at port {port} within 10 s")


if __name__ == "__main__":
    main()
