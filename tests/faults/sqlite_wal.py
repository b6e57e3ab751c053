"""Where a write-ahead log ends, as SQLite reads it: https://www.sqlite.org/fileformat2.html#the_write_ahead_log.

What stands behind the last valid commit frame is what a crash may leave torn: no acknowledgement has ever followed it,
since one follows the fsync of its commit frame.
"""

import struct
from pathlib import Path

HEADER = struct.Struct(">8I")
FRAME = struct.Struct(">6I")
LITTLE_ENDIAN, BIG_ENDIAN = 0x377F0682, 0x377F0683
Checksum = tuple[int, int]


def end_of_commits(path: Path) -> int:
    """Return how many bytes of the file are up to the end of its last valid commit frame; 0 if there is none."""
    content = path.read_bytes()
    if len(content) < HEADER.size:
        return 0
    magic, _, page_bytes, _, *salts_and_sum = HEADER.unpack_from(content)
    if magic not in {LITTLE_ENDIAN, BIG_ENDIAN}:
        return 0
    order = "<" if magic == LITTLE_ENDIAN else ">"
    salts = salts_and_sum[:2]
    total = _add((0, 0), content[: HEADER.size - 8], order)
    if list(total) != salts_and_sum[2:]:
        return 0
    end = 0
    at = HEADER.size
    while at + FRAME.size + page_bytes <= len(content):
        _, pages_after_commit, first_salt, second_salt, *told = FRAME.unpack_from(content, at)
        page = at + FRAME.size
        total = _add(_add(total, content[at : at + 8], order), content[page : page + page_bytes], order)
        if [first_salt, second_salt] != salts or list(total) != told:
            break
        at = page + page_bytes
        if pages_after_commit:
            end = at
    return end


def _add(total: Checksum, content: bytes, order: str) -> Checksum:
    first, second = total
    for one, two in struct.iter_unpack(f"{order}2I", content):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
