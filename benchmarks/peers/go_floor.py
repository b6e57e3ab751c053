"""net/http and franz-go: `benchmarks/peers/floor`, the same pipeline as the bare one, in Go."""

from benchmarks.payload import SECRET
from benchmarks.peers.build import built
from benchmarks.peers.peer import Peer, Setting
from benchmarks.processes import Measured, MeasuredProcess


def _start(setting: Setting) -> Measured:
    options = {"kafka": setting.servers, "topic": setting.topic, "destination": setting.url, "secret": SECRET}
    command = [str(built("floor")), *[f"-{name}={value}" for name, value in options.items()]]
    return MeasuredProcess("peer-floor", command, setting.folder)


PEER = Peer(
    name="Go: net/http + franz-go",
    about="one process; no ids, headers, rules, retries; what fails is lost",
    start=_start,
)
