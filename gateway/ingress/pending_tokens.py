"""The tokens that providers have sent to be shown to operators; nobody has verified who sent one.

The first few of a source are kept, for as long as its rules say `pending`, in this process's memory alone: in no record
and no log line, since events are signed with them later.
"""

from collections.abc import Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.model import RefusedError
from gateway.rules.rules import Source

MAX_TOKENS = 8
"""Of a source: so many may strangers have sent before the provider's, which is the one that it takes back."""


class PendingTokens:
    """The tokens by source, in the order in which they came."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        self._logger = logger
        self._tokens: dict[str, list[str]] = {}

    def show(self, source: str, token: str) -> None:
        """Keep a token for `all`. Raises RefusedError if there is no room for it."""
        tokens = self._tokens.setdefault(source, [])
        if token in tokens:
            return
        if len(tokens) >= MAX_TOKENS:
            raise RefusedError(429, "rate_limited", f"expected at most {MAX_TOKENS} verification tokens, got more")
        tokens.append(token)
        self._logger.info("token_awaits_operator", source=source, count=len(tokens))

    def retain(self, sources: Mapping[str, Source]) -> None:
        """Forget the tokens of sources that aren't pending any more."""
        self._tokens = {
            name: tokens
            for name, tokens in self._tokens.items()
            if name in sources and sources[name].verifier.is_pending
        }

    def all(self) -> Mapping[str, Sequence[str]]:
        return {name: tuple(tokens) for name, tokens in self._tokens.items()}
