"""Commands that ask the API of a process instead of the log and the index: `--api URL`, from any machine.

Importing it takes a tenth of a second, so each command does that only if it is asked to.
"""

from gateway.commands.base import Invocation, api_of, token_of
from gateway.ops.api_client import ApiClient


def client_of(call: Invocation) -> ApiClient:
    """Return the client that the arguments of a command ask for. Raises UsageError."""
    url = api_of(call)
    assert url is not None, "a command asks the API only if it has its URL"
    return ApiClient(url, token_of(call), is_plain_allowed=call.arguments.plain_http)
