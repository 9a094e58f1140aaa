"""How foreign JSON is read: small accessors that say what is wrong, and a Reader that keeps the first complaint.

Invariant: an absent or null field reads as empty, as Kubernetes' own decoder has it; a field of another type than
Kubernetes gives it is Unreadable, never converted and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from scheduler.model.pod import Refusal

Argument = TypeVar("Argument")
Result = TypeVar("Result")

NAME_MAX = 253  # longest name of any Kubernetes object
_SHOWN_MAX = 60
_HUGE = 10**30


class Unreadable(ValueError):  # noqa: N818 - it says what the field is
    """A field that cannot be read, or says what cannot be granted.

    Attributes:
        refusal: the same, as it is kept with the Request.
    """

    def __init__(self, text: str, *, code: str = "request.malformed", reason: str = "InvalidRequest") -> None:
        """Keep one sentence that says what to change."""
        super().__init__(text)
        self.refusal = Refusal(reason=reason, code=code, text=text)


class Reader:
    """Reads field after field and keeps the first refusal; what cannot be read takes its default."""

    def __init__(self) -> None:
        """Start without a complaint."""
        self.refusal: Refusal | None = None

    def refuse(self, error: Unreadable) -> None:
        """Keep this complaint when it is the first."""
        self.refusal = self.refusal or error.refusal

    def take(self, read: Callable[[Argument], Result], argument: Argument, default: Result) -> Result:
        """Return what `read` makes of its argument, or the default where it raises Unreadable."""
        try:
            return read(argument)
        except Unreadable as error:
            self.refuse(error)
            return default

    def mapping(self, value: object, where: str) -> Mapping[str, object]:
        """Return a JSON object, empty where it is none."""
        try:
            return mapping(value, where)
        except Unreadable as error:
            self.refuse(error)
            return {}

    def sequence(self, value: object, where: str) -> Sequence[object]:
        """Return a JSON list, empty where it is none."""
        try:
            return sequence(value, where)
        except Unreadable as error:
            self.refuse(error)
            return ()

    def name(self, value: object, where: str) -> str:
        """Return a string as long as a name may be, empty where it is none."""
        try:
            return name(value, where)
        except Unreadable as error:
            self.refuse(error)
            return ""


def shown(value: object) -> str:
    """Return a value as it may stand in a sentence: quoted and short; what is nested is only named."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_MAX else repr(value[:_SHOWN_MAX]) + "..."
    if isinstance(value, int) and abs(value) >= _HUGE:
        return "a huge number"
    return repr(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def mapping(value: object, where: str) -> Mapping[str, object]:
    """Return a JSON object; null is empty. Raises Unreadable."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unreadable(f"{where} must be an object; write it as Kubernetes documents it.")
    return value


def sequence(value: object, where: str) -> Sequence[object]:
    """Return a JSON list; null is empty. Raises Unreadable."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Unreadable(f"{where} must be a list; write it as Kubernetes documents it.")
    return value


def text(value: object, where: str) -> str:
    """Return a JSON string; null is empty. Raises Unreadable."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{where} must be a string; put it in quotes.")
    return value


def name(value: object, where: str) -> str:
    """Return a string no longer than the name of any Kubernetes object. Raises Unreadable."""
    found = text(value, where)
    if len(found) > NAME_MAX:
        raise Unreadable(f"{where} is longer than {NAME_MAX} characters; shorten it.")
    return found


def integer(value: object, where: str, low: int, high: int) -> int:
    """Return a JSON integer in low..high; null is 0. Raises Unreadable."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Unreadable(f"{where} must be a whole number between {low} and {high}; it is {shown(value)}.")
    return value
