"""Messages for the CEL library's errors, without anything from the event."""

import re


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"  # noqa: PLR2004 - a line of a terminal


def reason_of(error: Exception) -> str:
    """Reduce the library's message to its first sentence, without anything from the event."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    message = str(error)
    # Names were checked when the expression was compiled, so this is about the types of the arguments.
    if undefined := re.match("Undefined variable or function: '([^']*)'", message):
        return f"{undefined[1]} isn't defined for such a value"
    if message.startswith("No such overload"):
        return "an operand has the wrong type"
    if refused := re.match("(Function '[^']*' error: )(.*)", message, re.DOTALL):
        why = _REFUSAL.match(refused[2])
        message = refused[1] + (why[0] if why else "an argument that it doesn't take")
    message = re.split(r"\. |\.$|(?<=') on |: the operation is| CEL does not", message, maxsplit=1)[0]
    return shortened(message[:1].lower() + message[1:])


_REFUSAL = re.compile(
    "string parse error: [a-z ]+|(unsigned )?integer overflow|premature end of input|input [a-z ]+|trailing input"
)
