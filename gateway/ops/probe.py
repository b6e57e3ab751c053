"""Health check of the gateway on this machine: `python -m gateway.ops.probe [/livez|/readyz|/handshakes]`.

For images without a shell or curl; the command `gateway` itself takes ten times as long to load. Exit codes are 0 for
healthy, 1 for unhealthy, 2 for bad usage.
"""

import http.client
import os
import sys
from collections.abc import Mapping, Sequence

from gateway.model import UsageError
from gateway.settings import Address, from_sources

PATHS = ("/livez", "/readyz", "/handshakes")
TIMEOUT = 2.5  # Less than a health check's own, to print the result before that.


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Query the admin address in GATEWAY_ADMIN, print the response, and return the exit code."""
    path, *rest = argv or PATHS[:1]
    if path not in PATHS or (argv and rest):
        sys.stderr.write(f"expected {' or '.join(PATHS)}, got {' '.join(argv)!r}\n")
        return 2
    try:
        admin = from_sources({}, {"GATEWAY_ADMIN": environ.get("GATEWAY_ADMIN", "")}).admin
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        status, answer = _get(admin, path)
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"http://{admin}{path}: expected a response, got {str(error) or type(error).__name__}\n")
        return 1
    sys.stdout.write(f"{status} {answer}\n")
    return 0 if status == http.client.OK else 1


def _get(address: Address, path: str) -> tuple[int, str]:
    # Connecting to 0.0.0.0 or [::] connects to this machine. Proxies in the environment aren't used.
    connection = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(4096).decode(errors="replace")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
