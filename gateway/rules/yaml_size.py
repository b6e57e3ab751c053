"""How much a YAML text is once each alias is a copy, without making the copies: less than 300 bytes may be millions.

Nodes know their path (`routes[2].retry`), so that a long key costs as much as all that is below it: it is counted, too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import yaml

from gateway.rules.yaml_document import events_of
from gateway.turns import give_way

_MOST = 1 << 60
"""What is more is as good as this: numbers of nested aliases grow without end."""


class Size(NamedTuple):
    """So many values, whose paths have so many characters together."""

    values: int
    path_characters: int


def expanded_size(text: str) -> Size:
    """Return the size of all that a text has, as far as it is YAML: reading it says where it isn't."""
    waiting, anchors = [_Open(anchor=None, is_mapping=False, values=0)], dict[str, _Counted]()
    try:
        for event in events_of(text):
            give_way()
            match event:
                case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                    waiting.append(_Open(anchor=event.anchor, is_mapping=isinstance(event, yaml.MappingStartEvent)))
                    if event.anchor is not None:
                        anchors[event.anchor] = _ENDLESS  # until it is closed: what has an alias to itself has no end
                    continue
                case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                    closed = waiting.pop()
                    anchor, counted = closed.anchor, _Counted(closed.values, closed.path_characters, 0)
                case yaml.ScalarEvent():
                    anchor, counted = event.anchor, _Counted(1, 0, len(event.value))
                case yaml.AliasEvent():
                    anchor, counted = None, anchors.get(event.anchor or "", _Counted(1, 0, 0))
                case _:
                    continue
            if anchor is not None:
                anchors[anchor] = counted
            waiting[-1].add(counted)
    except yaml.YAMLError:
        pass
    values = path_characters = 0
    for each in reversed(waiting):
        values, path_characters = values + each.values, path_characters + each.path_characters
    return Size(min(values, _MOST), min(path_characters, _MOST))


class _Counted(NamedTuple):
    """A node with all that is below it, whose paths are counted from there on; `length` is that of a scalar."""

    values: int
    path_characters: int
    length: int


_ENDLESS = _Counted(_MOST, _MOST, 0)


@dataclass(slots=True, kw_only=True)
class _Open:
    """A list or mapping whose end hasn't come yet."""

    anchor: str | None
    is_mapping: bool
    values: int = 1
    path_characters: int = 0
    _key: int | None = None
    """The length of a key whose value comes next."""

    def add(self, counted: _Counted) -> None:
        """Count what is in it. A key is none of its values, but part of the path of its value and of all below."""
        if self.is_mapping and self._key is None:
            self._key = counted.length
            return
        label = _INDEX if self._key is None else self._key
        self._key = None
        self.values = min(_MOST, self.values + counted.values)
        own = counted.path_characters + counted.values * (label + 1)
        self.path_characters = min(_MOST, self.path_characters + own)


_INDEX = 4
"""Characters of an index in brackets, about."""
