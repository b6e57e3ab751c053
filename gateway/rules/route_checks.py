"""Reports contradictions within a route."""

from collections.abc import Mapping

from gateway.rules.build import message_problem, names_of
from gateway.rules.request_templates import Method
from gateway.rules.schema_reader import ParsedMapping, SchemaReader

_NOT_IN_ORDER = {
    "delay": "each delivery would hold back those of its key",
    "split": "the log tells the events of a key apart, and not their items",
}
"""Keys that an ordered route may not have, and why."""
_NOT_DEBOUNCED = {
    "order": "it keeps an order, of the events of its own key",
    "delay": "it delays, until a key is quiet",
    "split": _NOT_IN_ORDER["split"],
}
"""Keys that a debounced route may not have, and why."""


def check_order(route: ParsedMapping, sources: Mapping[str, ParsedMapping], reader: SchemaReader) -> None:
    """Report keys that `order` and `debounce` require, or that contradict them."""
    if "on_exhausted" in route.values and "order" not in route.values:
        message = "`on_exhausted` needs `order: key`, got none"
        reader.report(route.node.value["on_exhausted"], "value", message, at_key=True)
    if "debounce" in route.values:
        _refuse(route, _NOT_DEBOUNCED, "debounce", reader)
        return
    if "order" not in route.values:
        return
    _refuse(route, _NOT_IN_ORDER, "order: key", reader)
    for name in names_of(route, "from"):
        source = sources.get(name)
        if source is not None and source.node.child("key") is None:
            message = f"`order: key` needs a `key` of each source, got none at {name!r}"
            reader.report(route.node.value["order"], "value", message, at_key=True)


def _refuse(route: ParsedMapping, keys: Mapping[str, str], beside: str, reader: SchemaReader) -> None:
    for key, why in keys.items():
        if key in route.values:
            message = f"expected no `{key}` with `{beside}`, got one: {why}"
            reader.report(route.node.value[key], "value", message, at_key=True)


def check_split(route: ParsedMapping, reader: SchemaReader) -> None:
    """Report expressions that use `item` where there is none yet."""
    if "split" not in route.values:
        return
    choice, when = route.values.get("choice"), route.values.get("when")
    expressions = [
        *[("split", route.values["split"].items)],
        *([("when", when)] if when is not None else []),
        *([("to", each) for each in choice.name.expressions] if choice is not None else []),
    ]
    for key, expression in expressions:
        if expression.reads_item:
            message = "expected an expression over the event, got one over `item`: only `request` has that"
            reader.report(route.node.value[key], "expression", message)


def check_request(route: ParsedMapping, reader: SchemaReader) -> None:
    """Report a request that can't be made."""
    request = route.values.get("request")
    if request is not None and "preset" in request.values:
        if problem := message_problem(request):
            reader.report(request.node, "value", problem)
        return
    own = [] if request is None else [key for key in ("body", "form") if key in request.node.value]
    if request is None or not own:
        return
    if len(own) > 1:
        message = "expected `body` or `form`, got both"
        reader.report(request.node.value["form"], "value", message, at_key=True)
    if request.values.get("method") is Method.GET:
        message = f"expected no `{own[0]}` with `method: GET`, which has none, got one"
        reader.report(request.node.value[own[0]], "value", message, at_key=True)
