"""The kinds of values in routes.yaml that are CEL. They have to compile, and must be able to work."""

from collections.abc import Callable, Mapping

from gateway.model import ExpressionError
from gateway.rules.expression_checks import CONDITION, LIST, SCALAR, Wanted, check_constants
from gateway.rules.expressions import Expression, parse
from gateway.rules.scanner import is_free_name
from gateway.rules.splits import Split
from gateway.rules.templates import Template, TemplateError
from gateway.rules.value_kinds import Scalar, _text
from gateway.verify.config_reader import ConfigPath
from gateway.verify.presets import Preset, SchemeError, read_preset


def _expression_of(wanted: Wanted | None) -> Callable[[object], Expression]:
    def read(value: object) -> Expression:
        text = _text(value)
        expression = parse(text)
        check_constants(text, wanted)
        return expression

    return read


def _cel(wanted: Wanted | None = None) -> Scalar:
    """Return the kind of an expression with a value of these types."""
    read = _expression_of(wanted)
    return Scalar("a CEL expression", read, {"type": "string"}, unresolved=read)


def _route_split(value: object) -> Split:
    if value == "off":
        raise ValueError("expected CEL of a list, got 'off': a route without `split` splits nothing")
    return Split(_expression_of(LIST)(value))


def _expression_name(value: object) -> str:
    name = _text(value)
    if not is_free_name(name):
        raise ValueError
    return name


def provider(config: Mapping[str, object]) -> Preset:
    """Parse a provider of `providers:`, with its expressions. Raises SchemeError with all problems."""
    problems: dict[tuple[tuple[str | int, ...], str], None] = {}
    where = ConfigPath((), problems)
    preset = read_preset(config, where)
    if preset is not None:
        many = isinstance(config.get("verify"), list)
        methods = [(("verify", index) if many else ("verify",), each.id) for index, each in enumerate(preset.methods)]
        for path, text in (
            (("id",), preset.id),
            (("type",), preset.type),
            *[((*at, "id"), text) for at, text in methods],
        ):
            try:
                _expression_of(SCALAR)(text or "''")
            except ExpressionError as error:
                problems[path, f"expected a CEL expression, got {text!r}: {error}"] = None
        try:
            Template("" if preset.response is None else preset.response.body)
        except TemplateError as error:
            problems |= {(("respond", "body", *path), message): None for path, message, *_ in error.mistakes}
    if preset is None or problems:
        raise SchemeError(list(problems))
    return preset


CEL = _cel()
CEL_CONDITION = _cel(CONDITION)
CEL_SCALAR = _cel(SCALAR)
SPLIT = Scalar("CEL of a list, such as body.commits", _route_split, {"type": "string"}, unresolved=_route_split)
EXPRESSION_NAME = Scalar(
    "a name of letters, digits and _, which isn't one of CEL's or of the event's",
    _expression_name,
    {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
)
