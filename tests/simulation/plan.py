"""What a run is made of, decided before it begins: a seed becomes a world and a plain list of steps.

A plan is data: it is shrunk by leaving steps out, written to a file, and run again. Each concern draws from a stream of
its own, so that what is left out changes nothing of the rest.

"Swarm testing" (Groce et al., ISSTA 2012): each seed enables a random subset of the faults, since some bugs only show
where other faults leave them room.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import orjson

from gateway.engine.commit_progress import WINDOW
from gateway.engine.delivery.destination_lanes import MAX_BYTES
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY

FAULTS = (
    "crash",  # a process is gone at any await
    "expire",  # the group evicts a member, which finds out later
    "rebalance",  # everything is taken from everybody and given again
    "join",  # a process more, for a while
    "stop",  # a graceful restart
    "append",  # appends that fail, are late, or are stored though they failed
    "commit",  # commits that fail, or are stored though they failed
    "slow",  # questions and fetches take their time
    "skew",  # clocks of processes and brokers 30 s apart, brokers' that step, and leaders that change
    "step",  # a process starts with a clock an hour off
    "reload",  # rules change in mid-retry
    "order",  # pauses, kicks, replays
    "poison",  # records that can't be read, in any topic
    "gap",  # offsets that are never used
    "trouble",  # destinations that fail in every way
)
HANDOVER = "handover"
"""The process that owns the jobs gives them up in the middle of one: by a drain, or by a kill where others crash."""
GATEWAY_VERSIONS = "versions"
"""Processes of a newer version beside those of this one, which write in its format: added to other faults."""
TOPIC_FAULTS = (
    "leader",  # partitions that can't be read or written for a time, or have a damaged record for a time
    "grow",  # retry topics, the dead-letter and the parked topic get more partitions
)
"""Drawn beside the others, from a stream of their own, where something else fails, too."""
RETENTION = "retention"
"""The log's start moves past records that aren't done, unread ones mostly: added to any others."""
RECREATE = "remake"
"""A retry topic, the parked or the dead-letter topic, or where no process begins the control topic, is deleted and
recreated empty, after an order: added to any others. Not where leaders' clocks are apart, by which a record is
distinguished from one of the former topic; nor with retention, since nobody can count what a deleted topic lost."""
RESTARTS = frozenset({"crash", "stop", "start", HANDOVER})
"""Steps by which a process begins: it knows nothing of what was commanded before the control topic was recreated."""
PAIRS = "pairs"
"""The conditions, the sources or the order of one route change twice or more within moments, amid events of which an
earlier one isn't finished elsewhere; soon a process is killed, or gives up gracefully: added to any others."""
MOVES = "moves"
"""Reloads by which a source appends to another topic, and to its own again: added to any others."""
FORMER = "former"
"""The source that is dropped."""
RETIRED = "retired"
"""A source that the rules drop, whose topic is deleted later; sometimes it comes back under its name: added to others.
Its duplicates aren't dropped: what they would be of is gone."""
OFFSETS = "offsets"
"""Members have partitions again of which they can't ask for a while where they begin: added to any others."""
REFUSALS = "refusals"
"""Partitions of the shortest tier, or of the dead letters, take no appends though they can be read, one of them or all,
while a kick, a resume or a replay injects: added to any others."""
NARROWED = "narrowed"
"""A route that wasn't there gets a part of what it has missed by a replay that is narrowed, and the rest by others:
added to any others."""
REDELIVERED = "redelivered"
"""Single events are delivered again, some of them asked for twice under one name, cancelled, or amid a change of the
owner of the jobs: added to any others."""
TURNS = "turns"
"""A debounced route keeps the order of all events for a while, and is debounced again while it hasn't delivered them,
and soon they are read again, perhaps by a key of the same texts for other events; meanwhile several events have one
identity, and some of these no key: added to any others."""
SAME_TEXTS = "type == 'push' ? 'k1' : 'k2'"
"""A key by which a route is debounced, in CEL, that has the same texts as that of events, for others of them."""
GRACEFUL = ("stop", "join", "rebalance")
"""What must not repeat a single attempt, where destinations answer soon."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happens `at` seconds after the start."""

    at: float
    do: str
    what: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """A route, as far as a plan goes. `types` is None for every event of its sources."""

    name: str
    sources: tuple[str, ...]
    types: tuple[str, ...] | None
    to: tuple[str, ...]
    schedule: tuple[float, ...]
    max_attempts: int
    max_age: float
    jitter: float
    is_ordered: bool = False
    halts: bool = False
    stop: bool = False
    catch_all: bool = False
    delay: float = 0.0
    parts: int = 0
    """How many items each event has by which the route splits it; 0 if it doesn't."""
    quiet: float = 0.0
    """For how long a key has to be quiet until its last event is delivered; 0 if the route isn't debounced."""
    by: str = "key"
    """What its key is then, in CEL."""
    fails: int = 0
    """The condition fails for one of so many events; 0 for none."""

    def matches(self, source: str, kind: str) -> bool:
        return source in self.sources and (self.types is None or kind in self.types)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run: its world, and what happens to it. `faults` only says what the seed had enabled."""

    seed: int
    faults: tuple[str, ...]
    processes: int
    partitions: int
    tier_partitions: int
    nodes: int
    skew: float
    session: float
    window: int
    """Offsets between the lowest unfinished one and the last that is read: a small one is soon full."""
    horizon: float
    sources: tuple[str, ...]
    windows: Mapping[str, float]
    """Seconds for which a source's duplicates are dropped, where they are."""
    destinations: Mapping[str, Mapping[str, Any]]
    routes: tuple[RouteSpec, ...]
    steps: tuple[Step, ...]
    batch: int = CHECKPOINT_EVERY
    """Deliveries that a job injects between two of its checkpoints: a small one is soon full."""
    memory: int = MAX_BYTES
    """Bytes that a router may hold, and four times what its appends may: a little is soon full."""
    is_shared: bool = False
    """Whether all sources append to one topic, that of the first."""
    attempts: str = "off"
    """Which attempts are recorded."""
    is_kicked: bool = False
    """Whether an operator kicks each destination when nothing fails any more: what waits is soon out, then."""

    @property
    def is_graceful(self) -> bool:
        """Whether nothing may be repeated: neither log nor process nor destination ever fails."""
        return set(self.faults) <= {*GRACEFUL, "gap", "skew"}

    @property
    def has_stops(self) -> bool:
        """Whether some routes decide about others."""
        return any(route.stop or route.catch_all for route in self.routes)

    @property
    def is_long(self) -> bool:
        """Whether it lasts so long that regular polls are made seldom: time costs, events don't."""
        return self.horizon > 300

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)


def decode(text: bytes) -> Plan:
    """Read a plan that `encode` wrote."""
    body: dict[str, Any] = orjson.loads(text)
    body["routes"] = [RouteSpec(**_with_tuples(route)) for route in body["routes"]]
    body["steps"] = [Step(**step) for step in body["steps"]]
    return Plan(**_with_tuples(body))


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def plan_of(seed: int) -> Plan:
    """Make the plan of a seed."""
    faults = _faults(_stream(seed, "faults"))
    faults += _topic_faults(_stream(seed, "topic faults"), faults)
    world = _world(_stream(seed, "world"), seed, faults)
    world = _with_short_max_age(_stream(seed, "ages"), _with_undelayed_destination(_stream(seed, "fit"), world))
    world = _with_newer_processes(_stream(seed, "versions"), world)
    world = replace(world, is_shared=_stream(seed, "topics").random() < 0.3)
    world = _with_handovers(_stream(seed, "batch"), world)
    world = _with_little_memory(_stream(seed, "memory"), world)
    world = _with_final_kick(_stream(seed, "kicked"), world)
    world = _with_short_retention(_stream(seed, "retention"), world)
    world = _with_recreated_topics(_stream(seed, "remake"), world)
    world = _with_hurried_reloads(_stream(seed, "hurried"), world)
    world = _with_retired_source(_stream(seed, "retired"), world)
    world = _with_refusals(_stream(seed, "refused"), world)
    world = _with_narrowed_replays(_stream(seed, "narrowed"), world)
    world = _with_redeliveries(_stream(seed, "redelivered"), world)
    world = _with_delays(_stream(seed, "delays"), world)
    world = _with_splits(_stream(seed, "splits"), world)
    world = _with_stops(_stream(seed, "stops"), world)
    world = _with_debounces(_stream(seed, "debounces"), world)
    world = _with_turns(_stream(seed, "turning"), world)
    world = replace(world, attempts=_stream(seed, "attempts").choices(("off", "failures", "all"), (40, 30, 30))[0])
    reloads = list(_reloads(_stream(seed, "reloads"), world))
    orders = list(_orders(_stream(seed, "orders"), world))
    steps = [
        *_events(_stream(seed, "events"), world),
        *_versions(_stream(seed, "changes of version"), world),
        *_handovers(_stream(seed, "handovers"), world, orders),
        *_trouble(_stream(seed, "trouble"), world),
        *_log_faults(_stream(seed, "log"), world),
        *_partition_faults(_stream(seed, "topics"), world),
        *_unread_kicks(_stream(seed, "unread kicks"), world),
        *_process_faults(_stream(seed, "processes"), world),
        *_ordered_topic_faults(_stream(seed, "of topics"), world),
        *_rerouted(_stream(seed, "rerouted"), world, list(_apart(_stream(seed, "apart"), world, reloads))),
        *orders,
        *_deletions(_stream(seed, "deletions"), world),
        *_recreations(_stream(seed, "remakes"), world),
        *_pairs(_stream(seed, "pairs"), world),
        *_moves(_stream(seed, "moves"), world),
        *_retirements(_stream(seed, "retirements"), world),
        *_unknown_offsets(_stream(seed, "unknown offsets"), world),
        *_refusals(_stream(seed, "refusals"), world),
        *_narrowed_replays(_stream(seed, "narrowed replays"), world),
        *_stop_changes(_stream(seed, "changes of stops"), world),
        *_quiet_changes(_stream(seed, "changes of quiet"), world),
        *_turns(_stream(seed, "turns"), world),
        *_unrecorded(_stream(seed, "unrecorded"), world),
    ]
    steps += _redeliveries(_stream(seed, "redeliveries"), world, steps)
    steps += _failing_conditions(_stream(seed, "failing conditions"), world, steps)
    if RESTARTS.intersection([step.do for step in steps]):
        steps = [step for step in steps if not (step.do == "remake" and step.what["kind"] == "control")]
    return replace(world, steps=tuple(sorted(steps, key=lambda step: step.at)))


def _stream(seed: int, concern: str) -> Random:
    return Random(f"{seed}/{concern}")


def _faults(random: Random) -> tuple[str, ...]:
    kind = random.choices(("calm", "graceful", "trouble", "light", "heavy"), (10, 14, 16, 30, 30))[0]
    match kind:
        case "calm":
            chosen: Iterable[str] = ()
        case "graceful":
            chosen = random.sample((*GRACEFUL, "gap", "skew"), random.randint(1, 4))
        case "trouble":
            chosen = random.choice((("trouble",), ("trouble", "gap")))
        case "light":
            chosen = random.sample(FAULTS, random.randint(1, 3))
        case _:
            chosen = [fault for fault in FAULTS if random.random() < 0.5]
    return tuple(fault for fault in FAULTS if fault in set(chosen))


_POLICIES: Sequence[tuple[tuple[float, ...], int, float]] = (
    # schedule, attempts, age
    ((1.0, 2.0, 4.0), 3, 60.0),
    ((2.0,), 2, 60.0),
    ((5.0, 10.0, 20.0), 5, 300.0),
    ((0.5, 3.0, 30.0), 6, 600.0),
    ((10.0, 30.0, 120.0), 6, 3600.0),
)
_LONG_POLICY = ((30.0, 300.0, 3600.0), 6, 6 * 3600.0)


def _world(random: Random, seed: int, faults: tuple[str, ...]) -> Plan:
    horizon = random.choices((15.0, 40.0, 90.0, 600.0), (40, 40, 17, 3))[0]
    sources = tuple(f"s{number}" for number in range(random.choices((1, 2), (70, 30))[0]))
    destinations = {
        f"d{number}": {
            "timeout": random.choice((2.0, 5.0, 10.0, 10.0, 30.0)),
            "concurrency": random.choice((1, 5, 50, 50)),
            "rate": random.choice((None, None, None, 20.0)),
            "latency": random.choice((0.005, 0.02, 0.1)),
        }
        for number in range(random.randint(2, 5))
    }
    ordered = random.choices((0.2, 1.0), (85, 15))[0]  # the share of routes that keep the order
    routes = []
    for number in range(random.randint(1, 4)):
        schedule, attempts, age = random.choice((*_POLICIES, *((_LONG_POLICY,) if horizon > 500 else ())))
        is_ordered = random.random() < ordered
        routes.append(
            RouteSpec(
                name=f"r{number}",
                sources=tuple(random.sample(sources, random.randint(1, len(sources)))),
                types=random.choice((None, None, ("push",), ("push", "open"))),
                to=tuple(random.sample(sorted(destinations), random.choice((1, 1, 2)))),
                schedule=schedule,
                max_attempts=attempts,
                max_age=age,
                jitter=random.choice((0.0, 0.2)),
                is_ordered=is_ordered,
                halts=is_ordered and random.random() < 0.3,
            )
        )
    return Plan(
        seed=seed,
        faults=faults,
        processes=random.choices((1, 2, 3), (45, 40, 15))[0],
        partitions=random.choice((1, 2, 3)),
        tier_partitions=random.choice((1, 1, 2)),
        nodes=random.choice((1, 3)),
        skew=30.0 if "skew" in faults else 0.0,
        session=random.choice((6.0, 15.0, 45.0)),
        window=random.choices((WINDOW, 40), (85, 15))[0],
        horizon=horizon,
        sources=sources,
        windows={name: random.choice((5.0, 60.0, 3600.0)) for name in sources if random.random() < 0.5},
        destinations=destinations,
        routes=tuple(routes),
        steps=(),
    )


def _with_undelayed_destination(random: Random, world: Plan) -> Plan:
    """Often add a destination that nothing may delay, and a route to it, to a run in which only destinations fail."""
    if "trouble" not in world.faults or not set(world.faults) <= {"trouble", "gap"} or random.random() < 0.3:
        return world
    first = min(world.destinations)  # it is spared
    limits = {**world.destinations[first], "concurrency": 50, "rate": None}
    route = replace(world.routes[0], is_ordered=False, halts=False)
    if first not in route.to:
        route = replace(route, to=(first, *route.to))
    return replace(world, destinations={**world.destinations, first: limits}, routes=(route, *world.routes[1:]))


def _with_little_memory(random: Random, world: Plan) -> Plan:
    """Give some processes little memory; not where a destination may not be delayed."""
    if set(world.faults) <= {"trouble", "gap"} or random.random() < 0.85:
        return world
    return replace(world, memory=random.choice((8_000, 40_000, 400_000)))


def _with_short_max_age(random: Random, world: Plan) -> Plan:
    """Give some routes a `max_age` that ends before their attempts do."""
    routes = []
    for route in world.routes:
        if random.random() < 0.2:
            needed = sum(route.schedule[min(n, len(route.schedule) - 1)] for n in range(route.max_attempts - 1))
            route = replace(route, max_age=round(needed * random.uniform(0.3, 0.9), 3))  # noqa: PLW2901 - the same route
        routes.append(route)
    return replace(world, routes=tuple(routes))


def _with_handovers(random: Random, world: Plan) -> Plan:
    """Give some runs with orders many small batches, and owners that change in the middle of them."""
    if "order" not in world.faults or random.random() < 0.4:
        return world
    return replace(world, faults=(*world.faults, HANDOVER), batch=random.choice((2, 3, 5)))


def _with_final_kick(random: Random, world: Plan) -> Plan:
    """End some with a kick; not where names may be gone for an hour, or jobs have their own pace."""
    return replace(world, is_kicked=not set(world.faults) & {"reload", "order"} and random.random() < 0.25)


def _with_short_retention(random: Random, world: Plan) -> Plan:
    """Let some logs keep records for too short a time, beside any other fault."""
    return replace(world, faults=(*world.faults, RETENTION)) if random.random() < 0.1 else world


def _with_recreated_topics(random: Random, world: Plan) -> Plan:
    """Add topics that are deleted and recreated after orders to some, beside any other fault."""
    if random.random() > 0.12 or {"skew", RETENTION, GATEWAY_VERSIONS}.intersection(world.faults):
        return world
    order = () if "order" in world.faults else ("order",)
    return replace(world, faults=(*world.faults, *order, RECREATE), is_kicked=False)


def _with_retired_source(random: Random, world: Plan) -> Plan:
    """Add a source that is dropped, and whose topic is deleted, to some, beside most other faults."""
    others = {"skew", "step", RETENTION, RECREATE, GATEWAY_VERSIONS, MOVES}
    if random.random() > 0.06 or others.intersection(world.faults):
        return world
    reload = () if "reload" in world.faults else ("reload",)
    some = random.randrange(len(world.routes))
    routes = [
        replace(route, sources=(*route.sources, FORMER)) if number == some or random.random() < 0.5 else route
        for number, route in enumerate(world.routes)
    ]
    return replace(
        world,
        faults=(*world.faults, *reload, RETIRED),
        sources=(*world.sources, FORMER),
        routes=tuple(routes),
        is_shared=False,
        is_kicked=False,
    )


def _with_refusals(random: Random, world: Plan) -> Plan:
    """Add partitions that take no appends while jobs inject to some, beside any other fault."""
    if random.random() > 0.1 or GATEWAY_VERSIONS in world.faults:
        return world
    order = () if "order" in world.faults else ("order",)
    return replace(world, faults=(*world.faults, *order, REFUSALS), is_kicked=False)


def _with_narrowed_replays(random: Random, world: Plan) -> Plan:
    """Add replays of a part to some, beside any other fault, or where all that was routed by what rules is known.

    Mostly of a route from two sources and to two destinations, or there were nothing to leave out.
    """
    if random.random() > 0.06 or GATEWAY_VERSIONS in world.faults:
        return world
    faults = world.faults
    if random.random() < 0.6:
        faults = tuple(fault for fault in faults if fault in {*GRACEFUL, "reload", "order", "trouble", "gap"})
    faults += tuple(fault for fault in ("reload", "order") if fault not in faults)
    world = replace(world, faults=(*faults, NARROWED), is_kicked=False)
    if random.random() < 0.2:
        return world
    sources = tuple(dict.fromkeys((*world.sources, "s1")))
    first = replace(world.routes[0], sources=sources, to=tuple(random.sample(sorted(world.destinations), 2)))
    return replace(world, sources=sources, routes=(first, *world.routes[1:]))


def _with_redeliveries(random: Random, world: Plan) -> Plan:
    """Add redeliveries of single events to some, beside any other fault."""
    if random.random() > 0.12:
        return world
    order = () if "order" in world.faults else ("order",)
    return replace(world, faults=(*world.faults, *order, REDELIVERED))


def _with_delays(random: Random, world: Plan) -> Plan:
    """Delay what some routes deliver, beside any fault; a kick of their destinations leaves that alone."""
    if random.random() > 0.1 or all(route.is_ordered for route in world.routes):
        return world
    delays = (1.0, 3.0, 8.0, 30.0, *((200.0,) if world.is_long else ()))
    routes = [
        route if route.is_ordered or random.random() < 0.3 else replace(route, delay=random.choice(delays))
        for route in world.routes
    ]
    return replace(world, routes=tuple(routes), is_kicked=False)


def _with_splits(random: Random, world: Plan) -> Plan:
    """Let some routes split their events, beside any fault."""
    if random.random() > 0.08 or all(route.is_ordered for route in world.routes):
        return world
    routes = [
        route if route.is_ordered or random.random() < 0.3 else replace(route, parts=random.choice((1, 2, 3, 12)))
        for route in world.routes
    ]
    return replace(world, routes=tuple(routes), is_kicked=False)


def _with_stops(random: Random, world: Plan) -> Plan:
    """Let some routes leave nothing to those below, or take only what others leave, beside any fault.

    Where rules change, the last one mostly keeps the order, and is for all that the others leave.
    """
    if random.random() > 0.08 or len(world.routes) == 1:
        return world
    is_changed = "reload" in world.faults
    routes = [
        replace(route, stop=random.random() < 0.4, catch_all=random.random() < 0.2 and not is_changed)
        for route in world.routes
    ]
    if is_changed and random.random() < 0.6:
        routes[-1] = replace(routes[-1], sources=world.sources, types=None, is_ordered=True, delay=0.0, parts=0)
    return replace(world, routes=tuple(routes))


def _stop_changes(random: Random, world: Plan) -> Iterable[Step]:
    """Reloads by which routes begin or cease to leave something to those below, while a destination is slow."""
    if not world.has_stops or "reload" not in world.faults:
        return
    for count in range(random.randint(1, 3)):
        at, number = random.uniform(0.5, world.horizon), 30_000 + 100 * count
        yield from _slow_for_a_while(random, world, at)
        yield from _keyed_burst(random, world, at - random.uniform(0.0, 0.3), number)
        changed = random.sample(world.routes[:-1], random.randint(1, len(world.routes) - 1))
        what = {"changes": {route.name: {"stop": not route.stop} for route in changed}}
        yield Step(round(at, 6), "reload", {**what, "lag": random.choice((0.0, 0.0, 2.0))})
        yield from _keyed_burst(random, world, at + random.uniform(0.0, 0.5), number + 20)
        yield from _given_up(random, world, at + random.choice((0.3, 3.0)) * random.random())


def _with_debounces(random: Random, world: Plan) -> Plan:
    """Let some routes deliver the last event of each burst alone, beside any fault."""
    if random.random() > 0.1:
        return world
    quiet = (1.0, 3.0, 8.0, *((60.0,) if world.is_long else ()))
    routes = [
        replace(
            route,
            is_ordered=True,
            halts=False,
            delay=0.0,
            parts=0,
            quiet=random.choice(quiet),
            by=random.choice(("key", "key", "type", "source")),
        )
        if route.is_ordered or random.random() < 0.5
        else route
        for route in world.routes
    ]
    return replace(world, routes=tuple(routes), is_kicked=False)


def _quiet_changes(random: Random, world: Plan) -> Iterable[Step]:
    """Reloads by which keys have to be quiet for longer, or less long, or are delivered at once, amid bursts."""
    debounced = [route for route in world.routes if route.quiet]
    if not debounced or "reload" not in world.faults:
        return
    for count in range(random.randint(0, 2)):
        at, number = random.uniform(0.5, world.horizon), 40_000 + 100 * count
        changes: dict[str, dict[str, Any]] = {
            route.name: {"quiet": random.choice((0.0, 1.0, 5.0))}
            if random.random() < 0.6
            else {"by": random.choice(("key", "type", "source"))}
            for route in debounced
        }
        yield from _keyed_burst(random, world, at - random.uniform(0.0, 0.5), number)
        yield Step(round(at, 6), "reload", {"changes": changes, "lag": random.choice((0.0, 0.0, 2.0))})
        yield from _keyed_burst(random, world, at + random.uniform(0.0, 0.5), number + 20)


def _with_turns(random: Random, world: Plan) -> Plan:
    """Let the rules of some debounced routes change, and debounce a few more for that, beside any other fault."""
    has_debounced = any(route.quiet for route in world.routes)
    if GATEWAY_VERSIONS in world.faults or random.random() > (0.4 if has_debounced else 0.04):
        return world
    if not has_debounced:
        changed = replace(world.routes[0], is_ordered=True, halts=False, delay=0.0, parts=0)
        changed = replace(changed, quiet=random.choice((3.0, 8.0)), by=random.choice(("key", "type")))
        world = replace(world, routes=(changed, *world.routes[1:]))
    reload = () if "reload" in world.faults else ("reload",)
    return replace(world, faults=(*world.faults, *reload, TURNS), is_kicked=False)


def _turns(random: Random, world: Plan) -> Iterable[Step]:
    """A backlog of an ordered route, which is then debounced, and debounced no longer, and read again each time."""
    if TURNS not in world.faults:
        return
    route = random.choice([route for route in world.routes if route.quiet])
    for count in range(random.choice((1, 1, 2))):
        at, number = random.uniform(0.5, world.horizon), 60_000 + 100 * count
        yield from _out_of_order(random, at, random.choice(route.to))
        for turn, quiet in enumerate((0.0, route.quiet, 0.0)[: random.choice((2, 2, 3))]):
            lag = random.choice((0.0, 0.0, 2.0, 15.0))
            change = {"quiet": quiet, "by": random.choice((route.by, route.by, SAME_TEXTS))}
            yield Step(round(at, 6), "reload", {"changes": {route.name: change}, "lag": lag})
            yield from _keyed_burst(random, world, at + random.uniform(0.0, 1.0), number + 30 * turn)
            yield from _of_one_identity(random, world, at + random.uniform(0.0, 1.0), number + 30 * turn + 10)
            at += random.choice((0.3, 2.0)) * random.uniform(0.5, 1.5)
            if turn:
                yield from _given_up(random, world, at)


def _out_of_order(random: Random, at: float, destination: str) -> Iterable[Step]:
    """Let a destination fail for some seconds, or be slow."""
    kinds: Sequence[dict[str, Any]] = (
        {"kind": "error", "status": 503, "retry_after": None},
        {"kind": "hang"},
        {"kind": "slow", "latency": 2.0},
    )
    yield Step(round(at, 6), "behave", {"destination": destination, **random.choice(kinds)})
    healthy = {"destination": destination, "kind": "healthy"}
    yield Step(round(at + random.uniform(2.0, 20.0), 6), "behave", healthy)


def _of_one_identity(random: Random, world: Plan, at: float, first: int) -> Iterable[Step]:
    """Some events within moments, each of content of its own and of one of two identities, one of which has no key."""
    source, keys = random.choice(world.sources), (None, random.choice((None, "k1")))
    for number in range(first, first + random.randint(2, 6)):
        step, which = _small_event(random, world, number, at, 1.0), random.randrange(2)
        what = {"source": source, "id": f"evt_{world.seed:x}_{first + which}", "key": keys[which]}
        yield replace(step, what={**step.what, **what})


def _failing_conditions(random: Random, world: Plan, others: Sequence[Step]) -> Iterable[Step]:
    """Conditions that fail for some events, until they are mended; meanwhile the rules lack a name, and a kick comes.

    What was read halts a key or is a dead letter, and is matched again once the rules are others. Not beside replays:
    the ledger doesn't know which of their deliveries are dead letters at once.
    """
    if not {"reload", "order"} <= set(world.faults) or any(route.quiet for route in world.routes):
        return
    kinds = {step.what["kind"] if step.do == "order" else step.do for step in others}
    if not kinds.isdisjoint(("again", "replay", "drop", "redeliver")):
        return
    at = random.uniform(0.0, world.horizon / 2)
    chosen = random.sample(world.routes, random.randint(1, min(2, len(world.routes))))
    changes = {route.name: {"fails": random.choice((1, 2, 5))} for route in chosen}
    yield Step(round(at, 6), "reload", {"changes": changes, "lag": random.choice((0.0, 0.0, 2.0))})
    yield from _keyed_burst(random, world, at + random.uniform(0.0, 1.0), 50_000)
    names = [*world.sources, *[route.name for route in chosen]]
    for _ in range(random.randint(0, 2)):
        at += random.uniform(1.0, 10.0)
        without = random.sample(names, random.choice((0, 1, 1)))
        lag = random.choice((0.0, 2.0))
        yield Step(round(at, 6), "reload", {"without": without, "changes": changes, "lag": lag})
        at += lag + random.uniform(0.5, 5.0)
        of = random.choice((f"route/{chosen[0].name}", f"destination/{chosen[0].to[0]}"))
        yield Step(round(at, 6), "order", {"kind": "kick", "name": of})
    at += random.uniform(3.0, 20.0)
    yield Step(round(at, 6), "reload", {"changes": {}, "lag": random.choice((0.0, 2.0))})


def _with_hurried_reloads(random: Random, world: Plan) -> Plan:
    """Add pairs of reloads, moving sources, or offsets that can't be asked for to some, beside any other fault.

    Where rules change, there mostly is an ordered route, and a plain one beside it whose destination may be slow.
    """
    if GATEWAY_VERSIONS in world.faults:
        return world
    kinds = [kind for kind, share in ((PAIRS, 0.05), (MOVES, 0.03), (OFFSETS, 0.04)) if random.random() < share]
    if not kinds:
        return world
    if kinds == [OFFSETS]:
        return replace(world, faults=(*world.faults, OFFSETS))
    reload = () if "reload" in world.faults else ("reload",)
    world = replace(world, faults=(*world.faults, *reload, *kinds), is_kicked=False)
    if random.random() < 0.3:
        return world
    first = replace(world.routes[0], is_ordered=True, types=random.choice((("push",), ("push",), None)))
    number = len(world.routes)
    other = replace(
        first,
        name=f"r{number}",
        sources=world.sources,
        types=None,
        to=(list(world.destinations)[-1],),
        is_ordered=False,
    )
    return replace(world, routes=(first, *world.routes[1:], replace(other, halts=False)))


def _with_newer_processes(random: Random, world: Plan) -> Plan:
    """Let some be upgraded and rolled back meanwhile: a fault of its own, so that other seeds stay as they are."""
    if set(world.faults) & {"order", "reload", "skew", "step"} or not world.faults or random.random() < 0.7:
        return world
    return replace(world, faults=(*world.faults, GATEWAY_VERSIONS))


def _versions(random: Random, world: Plan) -> Iterable[Step]:
    """Restart processes as a newer version, and as this one again; in the end all of them are newer."""
    if GATEWAY_VERSIONS not in world.faults:
        return
    for _ in range(random.randint(1, 4)):
        place, at = f"p{random.randrange(world.processes)}", random.uniform(0.2, world.horizon)
        yield Step(round(at, 6), "version", {"process": place, "is_newer": random.random() < 0.6})
        yield Step(round(at, 6), "stop", {"process": place, "again": random.choice((0.1, 2.0))})
    for _ in range(random.randint(0, 2)):
        at = random.uniform(0.0, world.horizon)
        yield Step(round(at, 6), "ingress", {"is_newer": True})
        yield Step(round(at + random.uniform(0.1, 5.0), 6), "ingress", {"is_newer": False})


def _events(random: Random, world: Plan) -> Iterable[Step]:
    """Events that come in bursts and by ones, some of them again, as they were or with another body."""
    at = 0.0
    before: list[dict[str, Any]] = []
    keys = ("k1", "k2") if all(route.is_ordered for route in world.routes) else (None, None, "k1", "k2", "k3")
    count = random.randint(12, 50)
    for number in range(count):
        is_burst = random.random() < 0.6
        at += random.uniform(0, 0.02) if is_burst else random.uniform(0, 2 * 2.5 * world.horizon / count)
        if at > world.horizon:
            return
        what = {
            "source": random.choice(world.sources),
            "id": f"evt_{world.seed:x}_{number}",
            "type": random.choice(("push", "push", "open", "close")),
            "key": random.choice(keys),
            "size": random.choices((0, 1, 200, 5_000, 300_000), (8, 4, 75, 12, 1))[0],
            "body": number,
        }
        if before and random.random() < 0.15:
            what = random.choice(before) | ({"body": number} if random.random() < 0.3 else {})
        before.append(what)
        yield Step(round(at, 6), "event", {"n": number, **what})
        if "poison" in world.faults and random.random() < 0.05:
            where = random.choice(("events", "tier", "parked", "dead", "dedupe", "control"))
            what = {"where": where, "source": world.sources[0], "number": number, "kind": random.randrange(100)}
            yield Step(round(at, 6), "poison", what)
        if "gap" in world.faults and random.random() < 0.2:
            yield Step(round(at, 6), "gap", {"number": random.randrange(1 << 30), "count": random.randint(1, 600)})


def _trouble(random: Random, world: Plan) -> Iterable[Step]:
    """Phases in which a destination fails; the first is always spared, so that somebody can be delayed."""
    if "trouble" not in world.faults:
        return
    for name in list(world.destinations)[1:]:
        at = 0.0
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            at += random.uniform(0, world.horizon / 2)
            kinds = ("slow", "hang", "hang", "refuse", "error", "error", "throttle", "gone", "missing", "flap", "dns")
            kind = random.choice(kinds)
            how: dict[str, Any] = {"destination": name, "kind": kind}
            match kind:
                case "slow":
                    how["latency"] = random.uniform(0.3, 4.0)
                case "error":
                    how["status"] = random.choice((500, 503))
                    how["retry_after"] = random.choice((None, None, 8.0)) if how["status"] == 503 else None
                case "throttle":
                    how["retry_after"] = random.choice((None, 1.0, 15.0))
                case "flap":
                    how["period"] = random.uniform(0.05, 4.0)
                case _:
                    pass  # it says everything
            yield Step(round(at, 6), "behave", how)
            at += random.uniform(0.5, world.horizon)
            yield Step(round(at, 6), "behave", {"destination": name, "kind": "healthy"})


def _log_faults(random: Random, world: Plan) -> Iterable[Step]:
    for fault, kinds in (
        ("append", ("refused", "lost", "ghost", "late")),
        ("commit", ("refused", "lost", "late", "again")),
        ("slow", ("fetch", "question", "join")),
    ):
        if fault not in world.faults:
            continue
        for _ in range(random.randint(1, 4)):
            yield Step(
                round(random.uniform(0, world.horizon), 6),
                "log",
                {
                    "what": fault,
                    "kind": random.choice(kinds),
                    "seconds": round(random.choice((0.3, 2.0, 10.0)) * random.random(), 3),
                    "share": random.choice((0.3, 1.0)),
                },
            )
    if "skew" in world.faults and world.nodes > 1:
        for _ in range(random.randint(0, 3)):
            yield Step(round(random.uniform(0, world.horizon), 6), "leaders", {"by": random.randint(1, 2)})
    if "skew" in world.faults:
        for _ in range(random.randint(0, 2)):
            what = {"node": random.randrange(world.nodes), "to": random.uniform(-world.skew, world.skew)}
            yield Step(round(random.uniform(0, world.horizon), 6), "skew", what)


def _topic_faults(random: Random, faults: tuple[str, ...]) -> tuple[str, ...]:
    if not {"crash", "expire", "append", "commit", "slow"}.intersection(faults):
        return ()
    return tuple(fault for fault, share in zip(TOPIC_FAULTS, (0.3, 0.2), strict=True) if random.random() < share)


def _partition_faults(random: Random, world: Plan) -> Iterable[Step]:
    """Yield partitions that lose their leader, often several at a time, or have a damaged record; topics that grow."""
    if "leader" in world.faults:
        for _ in range(random.choice((0, 0, 1, 3))):
            at, seconds = random.uniform(0, world.horizon), random.choice((5.0, 40.0, 100.0)) * random.random()
            share = round(random.choice((0.0, 1.0, random.random())), 3)
            what: dict[str, Any] = {"number": random.randrange(1 << 30), "share": share, "seconds": round(seconds, 3)}
            yield Step(round(at, 6), "damage", what)
        for _ in range(random.randint(1, 3)):
            at, seconds = random.uniform(0, world.horizon), random.choice((0.5, 5.0, 40.0)) * random.random()
            for _ in range(random.choice((1, 1, 4))):
                what = {"number": random.randrange(1 << 30), "seconds": round(seconds, 3)}
                yield Step(round(at, 6), "leaderless", what)
    if "grow" in world.faults:
        for _ in range(random.randint(1, 3)):
            growth: dict[str, Any] = {
                "topic": random.choice(("retry.5s", "retry.20s", "dead", "parked")),
                "by": random.randint(1, 2),
            }
            yield Step(round(random.uniform(0, world.horizon), 6), "grow", growth)


def _process_faults(random: Random, world: Plan) -> Iterable[Step]:
    def when() -> float:
        return round(random.uniform(0.2, world.horizon), 6)

    def who() -> str:
        return f"p{random.randrange(world.processes)}"

    def visit() -> Iterable[Step]:
        name, at = f"x{random.randrange(2)}", when()
        yield Step(at, "start", {"process": name})
        yield Step(at + random.uniform(0.5, 20), "stop", {"process": name, "again": None})

    def step() -> Iterable[Step]:
        name, at = who(), when()
        yield Step(at, "clock", {"process": name, "by": random.choice((-3600.0, 3600.0))})
        if random.random() < 0.7:
            yield Step(at + 0.001, "stop", {"process": name, "again": random.choice((0.1, 2.0))})  # and begins with it
        if random.random() < 0.3:
            yield Step(at + random.uniform(0.5, 20), "clock", {"process": name, "by": 0.0})

    kinds: Mapping[str, tuple[int, Callable[[], Iterable[Step]]]] = {
        "crash": (4, lambda: [Step(when(), "crash", _crash(random, who()))]),
        "stop": (4, lambda: [Step(when(), "stop", {"process": who(), "again": random.choice((0.1, 2.0))})]),
        "join": (2, visit),
        "rebalance": (5, lambda: [Step(when(), "rebalance")]),
        "expire": (3, lambda: [Step(when(), "expire", {"process": who(), "learns": random.choice((0.2, 2.0, 8.0))})]),
        "step": (2, step),
    }
    for fault, (most, steps) in kinds.items():
        if fault in world.faults:
            for _ in range(random.randint(1, most)):
                yield from steps()


def _crash(random: Random, process: str) -> Mapping[str, Any]:
    return {"process": process, "steps": random.randint(1, 400), "again": random.choice((0.1, 1.0, 5.0))}


def _reloads(random: Random, world: Plan) -> Iterable[Step]:
    """Rules in which something is missing or another policy holds, and in the end (perhaps) the first ones again."""
    if "reload" not in world.faults:
        return
    at = 0.0
    for _ in range(random.randint(1, 3)):
        at += random.uniform(0, world.horizon / 2)
        change: dict[str, Any] = {"without": [], "policies": {}}
        if random.random() < 0.5:
            names = [*(route.name for route in world.routes), *world.destinations, *world.sources]
            change["without"] = random.sample(names, 1)
        if random.random() < 0.5:
            schedule, attempts, age = random.choice(_POLICIES)
            change["policies"] = {random.choice(world.routes).name: [list(schedule), attempts, age]}
        yield Step(round(at, 6), "reload", change)
        if random.random() < 0.7:
            at += random.uniform(0, world.horizon / 2)
            yield Step(round(at, 6), "reload", {"without": [], "policies": {}})


def _ordered_topic_faults(random: Random, world: Plan) -> Iterable[Step]:
    """Let a topic of events get more partitions, and put foreign records into the topics of ordered routes.

    These name an event's record as their origin, as only a router's can.
    """
    if "rebalance" in world.faults and random.random() < 0.3:
        source = world.sources[0] if world.is_shared else random.choice(world.sources)
        grown = {"topic": f"events.{source}", "by": random.randint(1, 3)}
        yield Step(round(random.uniform(0, world.horizon), 6), "grow", grown)
    if "poison" in world.faults:
        for number in range(random.choice((0, 0, 1, 2))):
            what = {
                "where": "ordered",
                "source": world.sources[0],
                "number": 1000 + number,
                "kind": random.randrange(100),
                "origin": {
                    "number": random.randrange(world.partitions),
                    "offset": random.choice((3, 10**14 - 1)),
                    "ahead": random.choice((-60.0, 0.0, 100.0, 1e9)),
                },
            }
            yield Step(round(random.uniform(0, world.horizon), 6), "poison", what)


def _apart(random: Random, world: Plan, reloads: Sequence[Step]) -> Iterable[Step]:
    """Let processes go by different rules for a while, and routes change whether they keep the order."""
    for step in reloads:
        toggled = [route.name for route in world.routes if random.random() < 0.25]
        lag = random.choice((2.0, 2.0, 15.0, 60.0))
        yield replace(step, what={**step.what, "toggled": toggled, "lag": lag})
    if reloads and random.random() < 0.3:  # a source, or a route, of which there was nothing at first
        names = [*world.sources, *(route.name for route in world.routes)]
        yield Step(0.0, "reload", {"without": [random.choice(names)], "policies": {}, "lag": 0.0})


def _rerouted(random: Random, world: Plan, reloads: Sequence[Step]) -> Iterable[Step]:
    """Let some reloads change what routes match, amid events; perhaps a process is killed in that moment.

    Sources and destinations are there still that a route isn't `from` or `to` any more, or is only now.
    """
    if random.random() > 0.4:
        yield from reloads
        return
    number = 4000
    for step in reloads:
        changes = {route.name: _rerouted_route(random, world, route) for route in world.routes if random.random() < 0.5}
        yield replace(step, what={**step.what, "changes": changes})
        if random.random() < 0.7:
            yield from _burst(random, world, max(0.0, step.at + random.uniform(-0.3, 0.3)), number)
            number += 20
        if "crash" in world.faults and random.random() < 0.5:
            process = f"p{random.randrange(world.processes)}"
            yield Step(round(step.at + random.uniform(0.0, 0.5), 6), "crash", _crash(random, process))


def _rerouted_route(random: Random, world: Plan, route: RouteSpec) -> Mapping[str, Any]:
    """Return what a route matches, from which sources, or to which destinations it goes, otherwise than it did."""
    match random.choice(("types", "types", "sources", "to")):
        case "types":
            others = [each for each in (None, ("push",), ("open", "close"), ("push", "open")) if each != route.types]
            chosen = random.choice(others)
            return {"types": None if chosen is None else list(chosen)}
        case "sources":
            return {"sources": random.sample(world.sources, random.randint(1, len(world.sources)))}
        case _:
            return {"to": random.sample(sorted(world.destinations), random.choice((1, 2)))}


def _orders(random: Random, world: Plan) -> Iterable[Step]:
    if "order" not in world.faults:
        return
    names = [
        *(f"route/{route.name}" for route in world.routes),
        *(f"destination/{name}" for name in world.destinations),
    ]
    for number in range(random.randint(1, 4)):
        at = random.uniform(0, world.horizon)
        name = random.choice(names)
        match action := random.choice(("pause", "pause", "kick", "replay", "drop", "again")):
            case "pause":
                yield Step(round(at, 6), "order", {"kind": "pause", "name": name})
                at += random.uniform(0, world.horizon / 2)
                yield Step(round(at, 6), "order", {"kind": "resume", "name": name})
            case "kick":
                yield Step(round(at, 6), "order", {"kind": "kick", "name": name})
            case "again":
                route, rate = random.choice(world.routes).name, random.choice((None, None, 5.0))
                again = {"kind": "again", "name": f"o{number}", "route": route, "rate": rate}
                yield Step(round(at, 6), "order", again | {"undelivered": number % 2 == 1})
            case _:
                yield Step(round(at, 6), "order", {"kind": action, "name": f"o{number}", "for": name})
                if action == "drop":  # and no replay brings it back
                    at += random.uniform(0, world.horizon / 4)
                    yield Step(round(at, 6), "order", {"kind": "replay", "name": f"o{number}b", "for": name})


def _unread_kicks(random: Random, world: Plan) -> Iterable[Step]:
    """A backlog, a kick of it, and a topic that can't be read meanwhile in which it may end up: parked, dead, again."""
    if not {"leader", "order"} <= set(world.faults):
        return
    for count in range(random.choice((1, 1, 2))):
        at, number = random.uniform(1.0, world.horizon), 8000 + 100 * count
        destination = random.choice(list(world.destinations)[1:])
        down = {"destination": destination, "kind": "error", "status": 503, "retry_after": None}
        yield Step(round(at, 6), "behave", down)
        yield from _burst(random, world, at + 0.1, number)
        at += random.uniform(2.0, 10.0)
        name = f"destination/{destination}"
        topic, ends = random.choice(
            (("parked", {"kind": "healthy"}), ("dead", {"kind": "gone"}), ("retry.5s", down), ("retry.20s", down))
        )
        if topic == "parked":
            yield Step(round(at - random.uniform(0.1, 2.0), 6), "order", {"kind": "pause", "name": name})
        yield Step(round(at, 6), "behave", {"retry_after": None, **ends, "destination": destination})
        yield Step(round(at, 6), "order", {"kind": "kick", "name": name})
        lost_at = at + random.uniform(-3.0, 5.0)
        seconds = random.choice((0.5, 3.0, 8.0)) * random.uniform(0.3, 1.0)
        for each in range(world.tier_partitions):
            what = {"topic": topic, "number": each, "seconds": round(seconds, 3)}
            yield Step(round(max(0.0, lost_at), 6), "leaderless", what)
        at += random.uniform(8.0, 30.0)
        yield Step(round(at, 6), "behave", {"destination": destination, "kind": "healthy"})
        if topic == "parked":
            yield Step(round(at, 6), "order", {"kind": "resume", "name": name})


def _refusals(random: Random, world: Plan) -> Iterable[Step]:
    """A backlog, an order that brings it out, and where that would go, or end, takes no appends for a while."""
    if REFUSALS not in world.faults:
        return
    for count in range(random.choice((1, 1, 2))):
        at, number = random.uniform(1.0, world.horizon), 9000 + 100 * count
        destination = random.choice(list(world.destinations)[1:])
        kind = random.choice(("retry", "retry", "parked", "dead"))
        begin, orders, end = _made_backlogs(random, kind, destination, 10 + count)
        if kind == "retry":  # or what waits would be in the shortest tier, which a kick leaves alone
            begin = replace(begin, what={**begin.what, "retry_after": random.choice((30.0, 120.0))})
        if kind == "retry" and random.random() < 0.5:
            kick = {"kind": "kick", "name": f"route/{random.choice(world.routes).name}"}
            orders = (orders[0], Step(0.0, "order", kick))
        yield replace(begin, at=round(at, 6))
        yield from _burst(random, world, at + 0.1, number)
        at += random.uniform(3.0, 15.0)
        refused = {
            "topic": random.choice(("retry.5s", "retry.5s", "dead")),
            "number": random.choice((None, None, *range(world.tier_partitions))),
            "seconds": round(random.choice((3.0, 30.0, 60.0)) * random.uniform(0.5, 1.0), 3),
        }
        yield Step(round(at + random.uniform(-1.0, 3.0), 6), "refuse", refused)
        yield replace(orders[0], at=round(at, 6))
        yield from _burst(random, world, at + random.uniform(0.0, 10.0), number + 20)
        at += random.choice((3.0, 20.0)) * random.random()
        yield replace(orders[1], at=round(at, 6))
        yield replace(end, at=round(at + random.choice((1.0, 30.0)) * random.random(), 6))


def _narrowed_replays(random: Random, world: Plan) -> Iterable[Step]:
    """A route that comes late, a replay of a part of what it has missed, another of that, and one of what is left."""
    if NARROWED not in world.faults:
        return
    route = random.choice((world.routes[0], random.choice(world.routes)))
    yield Step(0.0, "reload", {"without": [route.name], "policies": {}, "lag": 0.0})
    at, number = random.uniform(2.0, world.horizon), 9500
    marks = [round(at, 6)]
    for _ in range(random.choice((2, 2, 3))):
        yield from _burst(random, world, at, number)
        number += 20
        at += random.uniform(0.5, 5.0)
        marks.append(round(at, 6))
        at += 0.1
    yield Step(round(at, 6), "reload", {"without": [], "policies": {}, "lag": random.choice((0.0, 0.5))})
    at += random.choice((1.0, 3.0, 20.0))
    for count in range(random.choice((1, 1, 2))):
        part: dict[str, Any] = {"destination": random.choice(route.to), "source": random.choice(route.sources)}
        part |= {"since": random.choice(marks), "until": random.choice(marks)}
        if part["since"] >= part["until"]:
            del part[random.choice(("since", "until"))]
        kept = random.sample(sorted(part), random.choice((1, 1, 2, len(part))))
        again: dict[str, Any] = {"kind": "again", "name": f"n{count}", "route": route.name}
        again |= {"rate": random.choice((None, None, 5.0)), "undelivered": random.random() < 0.5}
        again["part"] = {name: part[name] for name in kept}
        yield Step(round(at, 6), "order", again)
        yield from _burst(random, world, at + random.uniform(-0.5, 2.0), number)
        number += 20
        at += random.choice((0.2, 5.0, 30.0)) * random.uniform(0.5, 1.0)
    if random.random() < 0.5:  # one event of the first two bursts
        one: dict[str, Any] = {"event": random.choice((9500, 9501, 9520, 9521))}
        if random.random() < 0.5:
            one["destination"] = random.choice(route.to)
        again = {"kind": "again", "name": "n8", "route": route.name, "rate": None, "part": one}
        yield Step(round(at, 6), "order", again)
        at += random.choice((0.2, 30.0))
    rest = {"kind": "again", "name": "n9", "route": route.name, "rate": None, "undelivered": True}
    yield Step(round(at, 6), "order", rest)


def _redeliveries(random: Random, world: Plan, others: Sequence[Step]) -> Iterable[Step]:
    """One event again, by all routes or one: asked for once more, cancelled, or while the jobs get another owner."""
    if REDELIVERED not in world.faults:
        return
    events = sorted([(step.at, step.what["n"]) for step in others if step.do == "event"])
    for count in range(random.choice((1, 2, 3, 6))):
        at = random.uniform(0.5, world.horizon + 5.0)
        known = [number for when, number in events if when < at]
        if not known:
            continue
        asked: dict[str, Any] = {"name": f"d{count}", "event": random.choice(known[-30:])}
        if random.random() < 0.3:
            asked["route"] = random.choice(world.routes).name
        if random.random() < 0.3:
            asked["destination"] = random.choice(sorted(world.destinations))
        yield Step(round(at, 6), "redeliver", asked)
        for _ in range(random.choice((0, 0, 1, 2))):
            later = at + random.choice((0.0, 0.3, 3.0, 60.0)) * random.random()
            yield Step(round(later, 6), "redeliver", asked)
        if random.random() < 0.15:
            later = at + random.choice((0.0, 0.3, 3.0)) * random.random()
            yield Step(round(later, 6), "redeliver", asked | {"undo": True})
        if random.random() < 0.5:
            drawn = list(_given_up(random, world, at + random.choice((0.3, 3.0)) * random.random()))
            joins = {"start", "stop"} if "join" in world.faults else set[str]()
            if {step.do for step in drawn} <= joins.union(world.faults):
                yield from drawn


def _handovers(random: Random, world: Plan, orders: Sequence[Step]) -> Iterable[Step]:
    """A backlog before each order; the order again, perhaps, by somebody else; and soon after it another owner."""
    if HANDOVER not in world.faults:
        return
    number = 1000
    for step in orders:
        before = step.at if step.what["kind"] == "pause" else max(0.0, step.at - random.uniform(1.0, 6.0))
        for _ in range(random.randint(5, 25)):
            what = {
                "source": random.choice(world.sources),
                "id": f"evt_{world.seed:x}_{number}",
                "type": random.choice(("push", "open")),
                "key": random.choice(("k1", "k2")) if all(route.is_ordered for route in world.routes) else None,
                "size": 20,
                "body": number,
            }
            yield Step(round(before + random.uniform(0, 0.5), 6), "event", {"n": number, **what})
            number += 1
        if step.what["kind"] == "pause":
            continue
        if step.what["kind"] in ("kick", "resume"):
            for _ in range(random.choice((0, 0, 1, 3))):
                yield Step(round(step.at + random.uniform(0, 1.5), 6), "order", step.what)
        begins = 2.5 if step.what["kind"] == "kick" else 0.0
        at = step.at + begins + random.uniform(0, 0.6)
        is_killed = "crash" in world.faults and random.random() < 0.5
        yield Step(round(at, 6), "handover", {"by": "crash" if is_killed else "stop", "steps": random.randint(1, 400)})


def _deletions(random: Random, world: Plan) -> Iterable[Step]:
    """Bursts of which the log deletes some: at once, behind slow fetches, while nobody reads, in mid-retry."""
    if RETENTION not in world.faults:
        return
    number = 2000
    for _ in range(random.randint(2, 5)):
        at = random.uniform(1.0, world.horizon)
        is_slow_allowed = "order" not in world.faults or "slow" in world.faults  # or pauses would be heard of late
        ways = ("at once", "at once", "away", "down", *(("slow", "slow") if is_slow_allowed else ()))
        within = 0.3
        kinds: Sequence[str] = ("events", "events", "retry", "retry", "ordered")
        match random.choice(ways):
            case "away":
                for process in range(world.processes):
                    what: dict[str, Any] = {"process": f"p{process}", "again": random.uniform(1.0, 6.0)}
                    yield Step(round(at - random.uniform(0.0, 1.0), 6), "stop", what)
            case "down":
                destination = random.choice(list(world.destinations)[1:])
                down = {"destination": destination, "kind": "error", "status": 500, "retry_after": None}
                yield Step(round(at, 6), "behave", down)
                healthy = {"destination": destination, "kind": "healthy"}
                yield Step(round(at + random.uniform(2.0, 40.0), 6), "behave", healthy)
            case "slow":
                slow = {"what": "slow", "kind": "fetch", "seconds": round(random.uniform(0.5, 5.0), 3), "share": 1.0}
                yield Step(round(at, 6), "log", slow)
            case _:
                within, kinds = 0.001, ["events"]  # nothing of that is read yet
        for _ in range(random.randint(3, 15)):
            yield _small_event(random, world, number, at, within)
            number += 1
        for count in range(random.randint(1, 4)):
            deleted = {
                "kind": random.choice(kinds),
                "number": random.randrange(1 << 30),
                "share": random.choice((0.5, 1.0, 1.0)),
            }
            later = within if count == 0 else random.choice((0.3, 2.0, 20.0)) * random.random()
            yield Step(round(at + later, 6), "delete", deleted)


def _recreations(random: Random, world: Plan) -> Iterable[Step]:
    """A backlog, an order that brings it out, another topic of that name, a backlog there, and the order again."""
    if RECREATE not in world.faults:
        return
    for count in range(random.choice((1, 1, 2))):
        at = random.uniform(1.0, world.horizon)
        destination = random.choice(list(world.destinations)[1:])
        kind = random.choice(("retry", "retry", "parked", "dead"))
        is_of_control = random.random() < 0.3
        if is_of_control:
            yield Step(0.5, "fill", {"count": random.choice((0, 30, 300))})
        begin, orders, end = _made_backlogs(random, kind, destination, count)
        yield replace(begin, at=round(at, 6))
        yield from _burst(random, world, at + 2.5, 3000 + 100 * count)
        at += 3.0 + random.uniform(0.0, 10.0)
        yield replace(orders[0], at=round(at, 6))
        at += random.choice((1.0, 5.0, 15.0)) * random.uniform(0.2, 1.0)
        away = random.choice((0.0, 0.0, 2.0, 15.0)) * random.uniform(0.5, 1.0)
        made = {
            "kind": "control" if is_of_control else kind,
            "number": random.randrange(1 << 30),
            "seconds": round(away, 3),
        }
        yield Step(round(at, 6), "remake", made)
        if kind == "parked":
            yield replace(begin, at=round(at + random.uniform(-1.0, 1.0) * away, 6))
        at += away + random.choice((0.0, 2.0, 10.0)) * random.random()
        yield from _burst(random, world, at + 2.5, 3050 + 100 * count)
        at += 3.0 + random.uniform(0.0, 10.0)
        if kind == "parked" or random.random() < 0.5:
            yield replace(orders[1], at=round(at, 6))
        yield replace(end, at=round(at + random.choice((0.0, 5.0, 40.0)) * random.random(), 6))


def _pairs(random: Random, world: Plan) -> Iterable[Step]:
    """Reloads of one route within moments, while a destination is slow, and what ends the reading of a process."""
    if PAIRS not in world.faults:
        return
    for count in range(random.randint(1, 3)):
        at, number = random.uniform(0.5, world.horizon), 5000 + 100 * count
        yield from _slow_for_a_while(random, world, at)
        yield from _keyed_burst(random, world, at - random.uniform(0.0, 0.3), number)
        route = random.choice((world.routes[0], random.choice(world.routes)))
        lag = random.choice((0.0, 0.0, 0.0, 2.0))
        for turn in range(random.choice((2, 2, 3))):
            yield Step(round(at, 6), "reload", {**_otherwise(random, world, route), "lag": lag})
            pause = random.choice((0.005, 0.05, 0.5, 3.0)) * random.uniform(1.0, 2.0)
            yield from _keyed_burst(random, world, at + random.uniform(0.0, 1.0) * pause, number + 20 * (turn + 1))
            at += pause
        yield from _given_up(random, world, at + random.uniform(-0.5, 1.0))
        if random.random() < 0.5:
            back = {"without": [], "policies": {}, "lag": random.choice((0.0, 2.0))}
            yield Step(round(at + random.choice((0.05, 2.0, 20.0)) * random.random(), 6), "reload", back)


def _otherwise(random: Random, world: Plan, route: RouteSpec) -> dict[str, Any]:
    """Return a reload by which one route keeps the order or not, or matches something else."""
    change: dict[str, Any] = {"without": [], "policies": {}}
    if random.random() < 0.3:
        change["toggled"] = [route.name]
    if random.random() < 0.85:
        change["changes"] = {route.name: _rerouted_route(random, world, route)}
    return change


def _moves(random: Random, world: Plan) -> Iterable[Step]:
    """Reloads by which a source moves to another topic, perhaps with a change of a route, and then back."""
    if MOVES not in world.faults:
        return
    for count in range(random.choice((1, 1, 2))):
        at, number = random.uniform(0.5, world.horizon), 6000 + 100 * count
        yield from _slow_for_a_while(random, world, at)
        yield from _keyed_burst(random, world, at - random.uniform(0.0, 0.3), number)
        source = random.choice(world.sources)
        for turn, topics in enumerate(({source: "moved"}, {})):
            is_changed = random.random() < 0.7
            change = _otherwise(random, world, world.routes[0]) if is_changed else {"without": [], "policies": {}}
            yield Step(round(at, 6), "reload", {**change, "topics": topics, "lag": random.choice((0.0, 0.0, 2.0))})
            yield from _keyed_burst(random, world, at + random.uniform(0.0, 0.5), number + 20 * (turn + 1))
            if random.random() < 0.7:
                yield from _given_up(random, world, at + random.choice((0.3, 3.0)) * random.random())
            at += random.choice((0.05, 2.0, 20.0)) * random.uniform(0.5, 1.0)


def _retirements(random: Random, world: Plan) -> Iterable[Step]:
    """Events of a source, rules without it, the end of its topic at once or long after that, and perhaps its return."""
    if RETIRED not in world.faults:
        return
    at, without = random.uniform(0.5, world.horizon), {"without": [FORMER], "policies": {}}
    for count in range(random.choice((1, 1, 2))):
        number = 12000 + 100 * count
        for turn in range(random.randint(3, 15)):
            event = _small_event(random, world, number + turn, at - random.uniform(0.0, 3.0), 3.0)
            yield replace(event, at=max(0.0, event.at), what={**event.what, "source": FORMER})
        yield Step(round(at, 6), "reload", {**without, "lag": random.choice((0.0, 2.0, 20.0))})
        at += random.choice((0.05, 3.0, 30.0, 100.0)) * random.uniform(0.5, 1.0)
        yield Step(round(at, 6), "retire", {"source": FORMER})
        if random.random() < 0.5:
            return
        at += random.choice((0.05, 5.0, 150.0)) * random.uniform(0.5, 1.0)
        yield Step(round(at, 6), "reload", {"without": [], "policies": {}, "lag": random.choice((0.0, 2.0))})
        for turn in range(random.randint(3, 15)):
            event = _small_event(random, world, number + 50 + turn, at + random.uniform(0.0, 3.0), 3.0)
            yield replace(event, what={**event.what, "source": FORMER})
        at += random.uniform(0.0, 30.0)


def _unknown_offsets(random: Random, world: Plan) -> Iterable[Step]:
    """Times in which nobody learns where to begin, and what lets everybody ask for that."""
    if OFFSETS not in world.faults:
        return
    for count in range(random.randint(1, 3)):
        at, number = random.uniform(0.5, world.horizon), 7000 + 100 * count
        what = {
            "what": "offsets",
            "kind": "unknown",
            "seconds": round(random.choice((0.3, 2.0, 10.0)) * random.uniform(0.3, 1.0), 3),
            "share": random.choice((0.5, 1.0)),
        }
        if random.random() < 0.5:
            yield from _slow_for_a_while(random, world, at)
        yield from _keyed_burst(random, world, at - random.uniform(0.0, 0.3), number)
        yield Step(round(at, 6), "log", what)
        yield from _given_up(random, world, at + random.uniform(0.0, 0.3))
        yield from _keyed_burst(random, world, at + random.uniform(0.0, 2.0), number + 20)


def _slow_for_a_while(random: Random, world: Plan, at: float) -> Iterable[Step]:
    """Let a destination be slow around a moment, most often the last."""
    names = list(world.destinations)[1:]
    destination = random.choice((names[-1], random.choice(names)))
    slow = {"destination": destination, "kind": "slow", "latency": random.choice((0.3, 2.0, 8.0))}
    yield Step(round(max(0.0, at - random.uniform(0.3, 1.0)), 6), "behave", slow)
    yield Step(round(at + random.uniform(1.0, 15.0), 6), "behave", {"destination": destination, "kind": "healthy"})


def _given_up(random: Random, world: Plan, at: float) -> Iterable[Step]:
    """Let a process be killed about that time, or stop, or leave some to one that joins; or everybody join anew."""
    at, process = round(max(0.0, at), 6), f"p{random.randrange(world.processes)}"
    match random.choice(("crash", "crash", "stop", "rebalance", "join", "expire")):
        case "crash":
            yield Step(at, "crash", _crash(random, process))
        case "stop":
            yield Step(at, "stop", {"process": process, "again": random.choice((0.1, 2.0))})
        case "join":
            yield Step(at, "start", {"process": "x2"})
            yield Step(round(at + random.uniform(0.5, 5.0), 6), "stop", {"process": "x2", "again": None})
        case "expire":
            yield Step(at, "expire", {"process": process, "learns": random.choice((0.2, 2.0, 8.0))})
        case _:
            yield Step(at, "rebalance")


def _keyed_burst(random: Random, world: Plan, at: float, first: int) -> Iterable[Step]:
    """Some events within a moment, numbered from the first on, most of them with keys."""
    within = random.choice((0.01, 0.3))
    for number in range(first, first + random.randint(2, 8)):
        step = _small_event(random, world, number, max(0.0, at), within)
        yield replace(step, what={**step.what, "key": random.choice(("k1", "k1", "k2", None))})


def _made_backlogs(random: Random, kind: str, destination: str, count: int) -> tuple[Step, Sequence[Step], Step]:
    """Return a backlog for a retry topic, the parked or the dead-letter topic, two orders about it, and its end."""
    name = f"destination/{destination}"
    resume, kick = [Step(0.0, "order", {"kind": word, "name": name}) for word in ("resume", "kick")]
    if kind == "parked":
        return Step(0.0, "order", {"kind": "pause", "name": name}), (resume, resume), resume
    healthy = Step(0.0, "behave", {"destination": destination, "kind": "healthy"})
    down: Mapping[str, Any] = {"kind": "gone"} if kind == "dead" else {"kind": "error", "status": 503}
    begin = Step(0.0, "behave", {"destination": destination, "retry_after": None, **down})
    if kind == "retry":
        return begin, (kick, kick), healthy
    actions = [random.choice(("drop", "replay")) for _ in range(2)]
    named = [{"kind": action, "name": f"m{count}{number}", "for": name} for number, action in enumerate(actions)]
    return begin, [Step(0.0, "order", what) for what in named], healthy


def _burst(random: Random, world: Plan, at: float, first: int) -> Iterable[Step]:
    """Some events, numbered from the first on."""
    for number in range(first, first + random.randint(2, 10)):
        yield _small_event(random, world, number, at, 0.3)


def _small_event(random: Random, world: Plan, number: int, at: float, within: float) -> Step:
    """One event of any source, at most `within` seconds after `at`."""
    event = {
        "source": random.choice(world.sources),
        "id": f"evt_{world.seed:x}_{number}",
        "type": random.choice(("push", "push", "open")),
        "key": random.choice(("k1", "k2")) if all(route.is_ordered for route in world.routes) else None,
        "size": 20,
        "body": number,
    }
    return Step(round(at + random.uniform(0, within), 6), "event", {"n": number, **event})


def _unrecorded(random: Random, world: Plan) -> Iterable[Step]:
    """Times in which attempts can't be recorded: a partition of theirs has no leader, or takes no appends."""
    if world.attempts == "off" or "append" not in world.faults:
        return
    for _ in range(random.randint(0, 3)):
        what = {"topic": "attempts", "number": random.randrange(4), "seconds": round(random.uniform(0.5, 20.0), 3)}
        yield Step(round(random.uniform(0.0, world.horizon), 6), random.choice(("leaderless", "refuse")), what)
