"""What a live list shows, and what keys do to it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ops.live_list import MAX_ROWS, Listed, LiveList, Quit, Resend, keys_of


def an_item(number: int, **changes: str) -> Listed:
    given = {"source": "github", "type": "push", "destination": "ci", "status": "pending", **changes}
    return Listed(id=f"dlv_{number}", at=1_700_000_000.0 + number, **given)


def a_list(count: int) -> LiveList:
    live = LiveList()
    for number in range(count):
        live.put(an_item(number))
    return live


def seen(live: LiveList, height: int = 5) -> tuple[list[int], int | None]:
    """Return the numbers of the rows, and which is selected."""
    window = live.window(height)
    numbers = [int(item.id.removeprefix("dlv_")) for item in window.rows]
    return numbers, None if window.selected is None else numbers[window.selected]


def press(live: LiveList, *keys: str) -> Resend | Quit | None:
    pressed = None
    for key in keys:
        pressed = live.press(key)
    return pressed


def test_the_newest_are_seen_first_and_the_newest_is_selected() -> None:
    assert seen(LiveList()) == ([], None)
    live = a_list(8)
    assert seen(live) == ([7, 6, 5, 4, 3], 7)
    live.put(an_item(8))
    assert seen(live) == ([8, 7, 6, 5, 4], 8)


def test_a_selection_stays_with_its_delivery_while_others_come() -> None:
    live = a_list(3)
    press(live, "down")
    for number in range(3, 20):
        live.put(an_item(number))
    numbers, selected = seen(live)
    assert selected == 1
    assert 1 in numbers
    press(live, "up", "up")
    assert seen(live)[1] == 3
    press(live, *["k"] * 40)
    assert seen(live) == ([19, 18, 17, 16, 15], 19)
    press(live, *["j"] * 40)
    assert seen(live) == ([4, 3, 2, 1, 0], 0)


def test_a_new_status_takes_the_place_of_the_old_one() -> None:
    live = a_list(3)
    live.put(an_item(1, status="delivered"))
    assert seen(live)[0] == [2, 1, 0]
    assert [item.status for item in live.matching()] == ["pending", "delivered", "pending"]


def test_the_selected_one_is_resent() -> None:
    live = a_list(3)
    assert press(live, "r") == Resend(an_item(2))
    assert press(live, "down", "r") == Resend(an_item(1))
    live.put(an_item(1, status="failed"))
    assert press(live, "r") == Resend(an_item(1, status="failed"))
    assert press(LiveList(), "r") is None
    assert press(live, "q") == Quit()


def test_a_filter_shows_what_has_all_its_words_in_any_case() -> None:
    live = LiveList()
    live.put(an_item(0, source="stripe", type="invoice.paid"))
    live.put(an_item(1, source="stripe", type="invoice.payment_failed", status="Failed"))
    live.put(an_item(2))
    assert press(live, "f", *"STRIPE fail") is None
    assert seen(live)[0] == [1]  # while it is being typed
    assert live.edited == "STRIPE fail"
    assert press(live, "enter", "r") == Resend(live.matching()[0])
    press(live, "f", "backspace", "backspace", "backspace", "backspace", "backspace", "enter")
    assert (live.filter, seen(live)[0]) == ("STRIPE", [1, 0])
    press(live, "f", *"zzz", "escape")
    assert live.filter == "STRIPE"  # as before
    press(live, "escape")
    assert seen(live)[0] == [2, 1, 0]


def test_keys_are_letters_of_a_filter_while_it_is_typed() -> None:
    live = a_list(2)
    assert press(live, "f", "r", "q", "j", "up", "\x01") is None
    assert live.edited == "rqj"
    assert seen(live) == ([], None)
    press(live, *"x" * 500)
    assert len(live.filter) == 200


def test_a_selection_that_the_filter_hides_gives_way_to_the_newest() -> None:
    live = a_list(3)
    live.put(an_item(3, source="stripe"))
    press(live, "down", "f", *"stripe", "enter")
    assert seen(live) == ([3], 3)


def test_only_so_many_are_kept_and_it_is_known_how_many_were_not() -> None:
    live = a_list(MAX_ROWS)
    press(live, *["down"] * MAX_ROWS)
    assert seen(live)[1] == 0
    live.put(an_item(MAX_ROWS))
    assert (live.total, live.dropped) == (MAX_ROWS, 1)
    assert seen(live)[1] == MAX_ROWS
    live.put(replace(an_item(5), status="delivered"))
    assert (live.total, live.dropped) == (MAX_ROWS, 1)


@given(
    st.lists(st.sampled_from([*"rfqjkx", "up", "down", "enter", "escape", "backspace"])),
    st.integers(1, 9),
    st.integers(0, 12),
)
def test_what_is_selected_is_seen_whatever_is_pressed(keys: list[str], height: int, count: int) -> None:
    live = a_list(count)
    for key in keys:
        pressed = live.press(key)
        window = live.window(height)
        assert len(window.rows) == min(height, len(live.matching()))
        assert (window.selected is None) == (not window.rows)
        if isinstance(pressed, Resend):
            assert window.selected is not None
            assert window.rows[window.selected] == pressed.item


@pytest.mark.parametrize(
    ("text", "keys", "begun"),
    [
        ("rf", ["r", "f"], ""),
        ("\x1b[A\x1b[B\x1bOA", ["up", "down", "up"], ""),
        ("\x1b", ["escape"], ""),
        ("\x1b\r\x7f\x08\x04", ["escape", "enter", "backspace", "backspace", "q"], ""),
        ("x\x1b[", ["x"], "\x1b["),
        ("x\x1b[1;5", ["x"], "\x1b[1;5"),
        ("\x1b[1;5Cx\x1b[3~y", ["x", "y"], ""),
        ("é", ["é"], ""),
    ],
)
def test_keys_are_read_of_what_a_terminal_sends(text: str, keys: list[str], begun: str) -> None:
    assert keys_of(text) == (keys, begun)


@given(st.text(alphabet="\x1b[OAB~;1rf\r", max_size=12), st.integers(0, 12))
def test_no_keys_are_lost_where_a_reading_ends(text: str, at: int) -> None:
    first, begun = keys_of(text[:at])
    second, rest = keys_of(begun + text[at:])
    if not text[:at].endswith("\x1b"):  # which was a key
        assert (first + second, rest) == keys_of(text)


def test_what_never_ends_is_let_go_of() -> None:
    assert keys_of("\x1b[" + "1" * 500) == ([], "")
