"""Why appends fail, and since when."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class AppendFailure:
    """Failed appends, with no success since. `is_confirmed`: the brokers have confirmed the reason."""

    began: float
    last: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)
    """By topic, in the order of the last failures."""
    is_confirmed: bool = False

    @property
    def reason(self) -> str:
        """Why the last one failed."""
        return next(reversed(self.reasons.values()))

    def add(self, topic: str, reason: str, now: float) -> None:
        """Add a failure."""
        self.last = now
        self.reasons.pop(topic, None)
        self.reasons[topic] = reason
