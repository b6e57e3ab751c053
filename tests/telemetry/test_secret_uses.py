"""How many events a secret verified in the last hour."""

from gateway.telemetry.secret_uses import HOUR, SecretUses

NOW = 1_700_000_000.0 // 60 * 60


def test_the_events_of_the_last_hour_are_counted_by_secret() -> None:
    uses = SecretUses()
    for second in range(0, 7200, 10):
        uses.add("shop", second % 20 // 10, at=NOW + second)
    assert uses.of("shop", 0, NOW + 7199) == uses.of("shop", 1, NOW + 7199) == 180
    assert uses.of("shop", 1, NOW + 7199 + HOUR / 2) == 90
    assert uses.of("shop", 1, NOW + 7200 + HOUR) == 0
    assert (uses.of("shop", 2, NOW), uses.of("crm", 0, NOW)) == (0, 0)


def test_a_clock_that_is_set_back_loses_no_event() -> None:
    uses = SecretUses()
    for at in (NOW, NOW - 600, NOW - 600):
        uses.add("shop", 0, at=at)
    assert uses.of("shop", 0, NOW) == 3


def test_memory_is_bounded() -> None:
    uses = SecretUses()
    for minute in range(1000):
        uses.add("shop", 0, at=NOW + 60 * minute)
    assert len(uses._uses["shop"][0].minutes) == 61
    assert uses.of("shop", 0, NOW + 60 * 999) == 60


def test_a_source_whose_secrets_changed_begins_anew() -> None:
    uses = SecretUses()
    uses.add("shop", 0, at=NOW)
    uses.add("crm", 0, at=NOW)
    uses.forget("shop")
    assert (uses.of("shop", 0, NOW), uses.of("crm", 0, NOW)) == (0, 1)
