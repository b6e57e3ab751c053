"""The verification tokens that providers have sent, for operators to see. None of their senders is verified.

The first few of a source are kept as long as its rules say `pending`, in the memory of this process only: no record
and no log line has them, since events are signed with them later.
"""

from collections.abc import Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.model import RefusedError
from gateway.rules.rules import Source

MAX_TOKENS = 8
"""Tokens per source. Strangers may send some before the provider does; the provider only takes its own back."""


class PendingTokens:
    """The tokens by source, in the order in which they came."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        self._logger = logger
        self._tokens: dict[str, list[str]] = {}

    def add(self, source: str, token: str) -> None:
        """Keep a token, once. Raises RefusedError if the source has MAX_TOKENS others."""
        tokens = self._tokens.setdefault(source, [])
        if token in tokens:
            return
        if len(tokens) >= MAX_TOKENS:
            raise RefusedError(429, "rate_limited", f"expected at most {MAX_TOKENS} verification tokens")
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
