"""The ways through the alternatives of a rule that one attention accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from attnopt.compiler.policy_text import Steps
from attnopt.compiler.rewriting import Planned, Rewriting
from attnopt.errors import PolicyError
from attnopt.ir.alternatives import Alternatives, FirstOf
from attnopt.ir.interfaces import Backend, Pass
from attnopt.ir.refusal import Refusal

MOST = 10_000  # ways at one attention


@dataclass(frozen=True)
class Refused:
    """An alternative that an attention does not accept: its ``passes`` up to the one that refuses, ``by`` that or a backend."""

    passes: tuple[Pass, ...]
    by: str
    refusal: Refusal

    def __str__(self) -> str:
        earlier = [p.name for p in (self.passes[:-1] if self.passes[-1].name == self.by else self.passes)]
        after = f" after {', '.join(earlier)}" if earlier else ""
        return f"{self.by} refused{after} {replace(self.refusal, hint='')}"


@dataclass(frozen=True)
class Way:
    """Passes as ``decide`` would take them; ``now``: what those that were accepted made of the attention."""

    now: Rewriting
    passes: tuple[Pass, ...] = ()

    def with_pass(self, p: Pass) -> tuple[Way, Refusal | None]:
        """One pass further; if it refuses, the attention stays as it is."""
        after = self.now.then(p)
        passes = (*self.passes, p)
        return (Way(self.now, passes), after) if isinstance(after, Refusal) else (Way(after, passes), None)


@dataclass
class Walk:
    """The ways at one attention.  ``passed_over``: the alternatives that it refuses where it accepts another one;
    ``refused``: those where it accepts none."""

    backends: Sequence[Backend]
    passed_over: list[Refused] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def through(self, steps: Steps, start: Way) -> list[Way]:
        """As a pass that is refused is skipped, so are alternatives of which each is."""
        ways = [start]
        for step in steps:
            if isinstance(step, Pass):
                ways = [way.with_pass(step)[0] for way in ways]
            else:
                ways = [onward for way in ways for onward in self._one_of(step, way) or [way]]
            _require_few(ways)
        return ways

    def _one_of(self, step: Alternatives, start: Way) -> list[Way]:
        """The ways through the alternatives that are accepted as a whole."""
        found, refused = list[Way](), list[Refused]()
        for own in step.alternatives:
            found += self._whole(own, start, refused)
            if found and isinstance(step, FirstOf):
                break
        (self.passed_over if found else self.refused).extend(refused)
        return found

    def _whole(self, steps: Steps, start: Way, refused: list[Refused]) -> list[Way]:
        ways = [start]
        for step in steps:
            onward = list[Way]()
            for way in ways:
                if not isinstance(step, Pass):
                    onward += self._one_of(step, way)
                    continue
                after, refusal = way.with_pass(step)
                if refusal is None:
                    onward.append(after)
                else:
                    refused.append(Refused(after.passes[len(start.passes) :], step.name, refusal))
            ways = onward
            _require_few(ways)
        return [way for way in ways if self._is_carried_out(way, start, refused)]

    def _is_carried_out(self, way: Way, start: Way, refused: list[Refused]) -> bool:
        """By a backend; nothing has to be done for no passes."""
        if way.now is start.now:
            return True
        made = way.now.planned(self.backends)
        if isinstance(made, Planned):
            return True
        passes = way.passes[len(start.passes) :]
        refused += [Refused(passes, f"backend {name}", refusal) for name, refusal in made.items()]
        return False


def _require_few(ways: Sequence[Way]) -> None:
    if len(ways) > MOST:
        raise PolicyError(
            f"the choices of one rule make more than {MOST} combinations", hint="give them fewer alternatives"
        )
