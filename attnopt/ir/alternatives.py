"""What a policy leaves open: a choice of passes, or of values of their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from attnopt.errors import PolicyError

if TYPE_CHECKING:
    _Anything = Any  # a choice of numbers stands where a number does
else:
    _Anything = object


@dataclass(frozen=True, init=False)
class Alternatives(_Anything):  # type: ignore[misc]
    """Several in the place of one.  In an option, they make several passes of the one: see ``expanded``.

    In the place of a pass, each is a pass, a sequence of passes, or None, which leaves the attention as it is.  One of the same
    kind as an alternative stands for its own.
    """

    name: ClassVar[str]  # in texts and files
    alternatives: tuple[Any, ...]

    def __init__(self, *alternatives: Any) -> None:
        if not alternatives:
            raise PolicyError(f"{self.name}: there is nothing to choose from", hint="give at least one alternative")
        flat = [x for a in alternatives for x in (a.alternatives if type(a) is type(self) else (a,))]
        object.__setattr__(self, "alternatives", tuple(flat))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.alternatives))})"


class Choice(Alternatives):
    """One of these, which ``attnopt.search`` finds: ``Choice(None, LocalWindow(left=Choice(64, 256), sinks=4))``.

    Several choices of one rule make all combinations.  Raises PolicyError.
    """

    name: ClassVar[str] = "choice"


class FirstOf(Alternatives):
    """The first of these that the attention does not refuse: ``FirstOf(GroupedQuery(2), GroupedQuery(4))``.

    What a sequence makes has to be accepted as a whole, by its passes and by a backend.  Raises PolicyError.
    """

    name: ClassVar[str] = "first-of"


KINDS: tuple[type[Alternatives], ...] = (Choice, FirstOf)


def expanded(make: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Alternatives | None:
    """``make(*args, **options)`` for each alternative of an argument, the first argument outermost; None if there are none."""
    for place, given in enumerate(args):
        if isinstance(given, Alternatives):
            before, after = args[:place], args[place + 1 :]
            return type(given)(*(make(*before, x, *after, **options) for x in given.alternatives))
    for option, given in options.items():
        if isinstance(given, Alternatives):
            return type(given)(*(make(*args, **{**options, option: x}) for x in given.alternatives))
    return None
