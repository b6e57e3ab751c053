"""Which command has resolved a dead letter."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice

from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties, partition_key
from gateway.log.base import Partition


class ResolvedIndex:
    """An index of the commands about dead letters as far as they are carried out: few are checked for each dead letter.

    They are indexed by the records or deliveries that they name, else by their filter. Of those with the same filter,
    the first command that reaches a record is found by bisection: an operator who replays a destination's dead letters
    every hour gives hundreds of them.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, list[ControlRecord]] = {}
        self._by_filter: dict[tuple[str | None, str | None, str | None], _SameFilter] = {}

    def add(self, command: ControlRecord) -> None:
        if names := command.filter.records or command.filter.ids:
            for name in names:
                self._by_name.setdefault(name, []).append(command)
        else:
            self._by_filter.setdefault(_kind_of(command.filter), _SameFilter()).add(command)

    def remove(self, command: ControlRecord) -> None:
        if names := command.filter.records or command.filter.ids:
            for name in names:
                self._by_name[name].remove(command)
                if not self._by_name[name]:
                    del self._by_name[name]
        else:
            self._by_filter[_kind_of(command.filter)].remove(command)

    def resolving(self, letter: DeadLetterProperties, partition: Partition, offset: int) -> Iterator[ControlRecord]:
        """Yield the commands that resolved a dead letter; of those with the same filter only the first."""
        for command in (*self._by_name.get(letter.id, ()), *self._by_name.get(f"{partition.number}@{offset}", ())):
            if command.is_before_checkpoint(partition, offset, letter.at) and command.is_for(letter):
                yield command
        if not self._by_filter:
            return
        for route in (letter.route, None):
            for destination in (letter.destination, None):
                for reason in (letter.reason, None):
                    same = self._by_filter.get((route, destination, reason))
                    if same is not None:
                        yield from same.first(letter, partition, offset)


class _SameFilter:
    """The commands with the same filter, each with the furthest offset reached by it or any earlier one."""

    def __init__(self) -> None:
        self._commands: list[ControlRecord] = []
        self._furthest: dict[str, list[int]] = {}  # by partition, for each command
        self._computed = 0  # commands whose furthest offsets are computed

    def add(self, command: ControlRecord) -> None:
        self._commands.append(command)

    def remove(self, command: ControlRecord) -> None:
        self._commands.remove(command)
        self._furthest, self._computed = {}, 0

    def first(self, letter: DeadLetterProperties, partition: Partition, offset: int) -> Iterator[ControlRecord]:
        self._compute_furthest()
        reach = self._furthest.get(partition_key(partition))
        if reach is None:
            return
        for command in islice(self._commands, bisect_right(reach, offset), None):
            if command.is_before_checkpoint(partition, offset, letter.at) and command.is_for(letter):
                yield command
                return

    def _compute_furthest(self) -> None:
        for index in range(self._computed, len(self._commands)):
            checkpoint = self._commands[index].checkpoint
            for partition_name in checkpoint.keys() - self._furthest.keys():
                self._furthest[partition_name] = [0] * index
            for partition_name, reach in self._furthest.items():
                reach.append(max(reach[-1] if reach else 0, checkpoint.get(partition_name, 0)))
        self._computed = len(self._commands)


def _kind_of(which: DeadFilter) -> tuple[str | None, str | None, str | None]:
    return which.route, which.destination, which.reason
