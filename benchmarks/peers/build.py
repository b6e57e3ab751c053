"""Peers in Go, built once into .tools/peers: `python -m benchmarks.peers.build`, two minutes on two cores.

Their modules are those of benchmarks/peers/go.mod and go.sum; nothing but the Go module proxy is asked.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dev.tools import HOME, ToolMissingError

FOLDER = Path(__file__).resolve().parent
PROGRAMS = ("floor", "bento")
BUILD_TIMEOUT = 1800.0


def built(name: str) -> Path:
    """Return the program, built if need be. Callers at the same time wait for each other.

    Raises ToolMissingError without Go, or if it can't be built.
    """
    binary = HOME / "peers" / _digest(name) / name
    if binary.exists():
        return binary
    if (go := shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")) is None:
        raise ToolMissingError(f"expected Go to build {name} with")
    binary.parent.mkdir(parents=True, exist_ok=True)
    with (HOME / "peers" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists():
            return binary
        fresh = binary.with_suffix(".new")
        # -mod=readonly: what go.sum has no digest of is refused.
        command = (go, "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(fresh), f"./{name}")
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=FOLDER,
            timeout=BUILD_TIMEOUT,
            env=os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"},
        )
        if result.returncode:
            raise ToolMissingError(f"{name}: {result.stderr.strip()[-1000:]}")
        fresh.rename(binary)
    return binary


def _digest(name: str) -> str:
    """Return what changes with a program's source or its pins."""
    files = [FOLDER / "go.mod", FOLDER / "go.sum", *sorted((FOLDER / name).iterdir())]
    return hashlib.sha256(b"\0".join([file.read_bytes() for file in files])).hexdigest()[:16]


def main() -> int:
    for name in PROGRAMS:
        try:
            print(built(name), flush=True)
        except ToolMissingError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
