"""Content codings are undone as far as a limit, whatever they are given."""

import gzip
import itertools
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies.codings import MAX_CODINGS, MAX_CONTENT, MAX_MEMBERS, codings, decompressed
from gateway.model import UnreadableBodyError
from tests.bodies.cost import MOST_SECONDS, peak_bytes, seconds

BODY = b'{"a": 1}'
EMPTY_BLOCKS = 1 << 20


def raw_deflate(content: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(content) + deflater.flush()


CODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}


def refusal(body: bytes, field: str, limit: int = MAX_CONTENT) -> tuple[int, str]:
    with pytest.raises(UnreadableBodyError) as caught:
        decompressed(body, field, limit)
    return caught.value.status, caught.value.reason


def empty_blocks(size: int) -> bytes:
    """Return deflate's blocks that take the longest: each has the tables of two codes in it, and nothing else."""
    bits = [0, 0, 1] + [0] * 10  # not the last; codes of its own, of the fewest symbols
    lengths = {18: 1, 0: 2, 1: 2}  # of the code of lengths, as many of them as reach to that of 1
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    bits += [len(order) - 4 >> n & 1 for n in range(4)]
    bits += [lengths.get(symbol, 0) >> n & 1 for symbol in order for n in range(3)]
    for zeros in (138, 118):
        bits += [0, *[zeros - 11 >> n & 1 for n in range(7)]]
    bits += [1, 1, 1, 1, 0]  # the code of an end, that of a distance, and the end
    whole = bits * 8
    unit = bytes(sum(bit << n for n, bit in enumerate(whole[at : at + 8])) for at in range(0, len(whole), 8))
    return unit * (size // len(unit))


@pytest.mark.parametrize("field", ["gzip", "GZip", "x-gzip", "deflate", "gzip, identity", " , gzip ,"])
def test_a_coding_is_undone(field: str) -> None:
    coder = CODERS[codings(field)[0]]
    assert decompressed(coder(BODY), field) == BODY


@pytest.mark.parametrize("field", ["", "identity", ",identity,,"])
def test_a_body_without_a_coding_is_itself(field: str) -> None:
    assert decompressed(BODY, field) == BODY


@given(st.binary(max_size=300), st.lists(st.sampled_from(sorted(CODERS)), max_size=MAX_CODINGS))
def test_several_codings_are_undone_from_the_last_to_the_first(content: bytes, names: list[str]) -> None:
    body = content
    for name in names:
        body = CODERS[name](body)
    assert decompressed(body, ", ".join(names)) == content


@given(st.binary(max_size=300))
def test_deflate_may_lack_its_header(content: bytes) -> None:
    assert decompressed(raw_deflate(content), "deflate") == content


def test_gzip_may_have_members_and_deflate_has_none() -> None:
    assert decompressed(gzip.compress(b"[1") + gzip.compress(b"]"), "gzip") == b"[1]"
    assert refusal(zlib.compress(b"[1") + zlib.compress(b"]"), "deflate") == (400, "malformed_content")
    member = gzip.compress(b"1")
    assert decompressed(member * (MAX_MEMBERS - 1), "gzip") == b"1" * (MAX_MEMBERS - 1)
    assert refusal(member * (MAX_MEMBERS + 1), "gzip") == (400, "malformed_content")


@pytest.mark.parametrize("name", sorted(CODERS))
def test_what_is_cut_off_or_damaged_is_malformed(name: str) -> None:
    whole = CODERS[name](BODY * 9)
    for body in (BODY, whole[:-1], whole[:-8], whole[:5], whole + b"\0", whole[:12] + b"\xff\xff" + whole[14:]):
        assert refusal(body, name) == (400, "malformed_content")


@pytest.mark.parametrize("field", ["br", "zstd", "compress", "gzip, br", "br, gzip", "gzip;q=1", "gzip gzip"])
def test_another_coding_is_not_read_though_it_may_be_the_last_to_be_undone(field: str) -> None:
    assert refusal(gzip.compress(BODY), field) == (415, "content_coding")


def test_the_number_of_codings_is_bounded() -> None:
    assert refusal(BODY, ",".join(["gzip"] * (MAX_CODINGS + 1))) == (400, "malformed_content")
    assert refusal(BODY, ",".join(["gzip"] * 10_000)) == (400, "malformed_content")


@pytest.mark.parametrize("name", sorted(CODERS))
def test_a_body_decompresses_to_the_limit_and_no_further(name: str) -> None:
    assert len(decompressed(CODERS[name](b"0" * MAX_CONTENT), name)) == MAX_CONTENT
    assert refusal(CODERS[name](b"0" * (MAX_CONTENT + 1)), name) == (413, "content_too_large")
    assert decompressed(CODERS[name](b"0" * 9), name, 9) == b"0" * 9
    assert refusal(CODERS[name](b"0" * 10), name, 9)[0] == 413


def test_a_member_does_not_begin_the_limit_anew() -> None:
    member = gzip.compress(b"0" * (MAX_CONTENT // 2 + 1))
    assert refusal(member * 2, "gzip") == (413, "content_too_large")


def test_what_a_coding_in_between_decompresses_to_is_bounded_too() -> None:
    """Without that, it could give the next coding more to read than any body has."""
    inner = zlib.compress(b"0" * 100) + b"\0" * MAX_CONTENT
    assert refusal(zlib.compress(inner), "deflate, deflate") == (413, "content_too_large")


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a gigabyte of zeros": (lambda: gzip.compress(gzip.compress(b"\0" * (1 << 28))), "gzip, gzip"),
    "one coding": (lambda: gzip.compress(b"\0" * (1 << 28)), "gzip"),
    "empty blocks": (lambda: empty_blocks(EMPTY_BLOCKS), "deflate"),
    "packed empty blocks": (lambda: zlib.compress(empty_blocks(2 * EMPTY_BLOCKS - 6000)), "deflate, deflate"),
    "empty members": (lambda: gzip.compress(b"") * 50_000, "gzip"),
    "a name that never ends": (lambda: b"\x1f\x8b\x08\x08" + b"\0" * 6 + b"x" * (1 << 20), "gzip"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_neither_time_nor_memory(name: str) -> None:
    make, field = BOMBS[name]
    body = make()

    assert seconds(lambda: decompressed(body, field)) < MOST_SECONDS
    assert peak_bytes(lambda: decompressed(body, field)) < 4 * MAX_CONTENT
    assert refusal(body, field)[0] in {400, 413}


def test_messages_have_nothing_of_the_sender() -> None:
    for field, body in itertools.product(("evil", "gzip", "deflate"), (b"evil", gzip.compress(b"evil")[:-1])):
        with pytest.raises(UnreadableBodyError) as caught:
            decompressed(body, field)
        assert "evil" not in str(caught.value)
