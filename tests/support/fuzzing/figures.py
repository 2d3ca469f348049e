"""Cases in numbers: how many were found, refused with which reason, wrong or crashed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fuzzing.laws import Outcome

LEAST = 0.97  # of real attentions that have to be found


@dataclass
class Figures:
    """Sums over outcomes."""

    cases: int = 0
    attentions: int = 0
    found: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    laws: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Figures:
        made = cls()
        for outcome in outcomes:
            made.add(outcome)
        return made

    def add(self, o: Outcome) -> None:
        self.cases += 1
        self.attentions += o.attentions
        self.found += o.found
        self.failures[o.failure or "right"] += 1
        self.missed.update(code for code, _ in o.missed)
        self.rewritten.update(o.rewritten)
        self.refused.update(o.refused)
        self.laws.update(o.laws)
        self.features.update(_features(o))

    @property
    def share(self) -> float:
        return self.found / max(1, self.attentions)

    @property
    def passed(self) -> bool:
        """None wrong, none crashing, enough found."""
        return not self.failures["wrong"] and not self.failures["crashed"] and self.share >= LEAST

    def __str__(self) -> str:
        lines = [
            f"{self.cases} cases: {self.failures['wrong']} wrong, {self.failures['crashed']} crashing",
            f"{self.found} of {self.attentions} attentions found: {self.share:.2%}",
            *_table("missed, by reason", self.missed),
            *_table("rewritten as the oracle says", self.rewritten),
            *_table("refused", Counter({f"{name} [{code}]": n for (name, code), n in self.refused.items()})),
            *_table("laws on whole models", self.laws),
            *_table("cases with", self.features),
        ]
        return "\n".join(lines)


def _table(title: str, counts: Counter[str]) -> list[str]:
    return [f"{title}:", *(f"  {n:7d}  {what}" for what, n in counts.most_common())] if counts else []


def _features(o: Outcome) -> set[str]:
    c = o.case
    found = {f"container {c.container}", f"{c.axes} inputs", c.dtype, f"length {c.length}"}
    found |= {f"branch on {c.branch}"} if c.branch else set()
    found |= {f"reuse: {c.reuse}"} if c.reuse else set()
    found |= {"several attentions"} if o.attentions > 1 else set()
    found |= {"a decoy beside"} if len(c.attentions) < len(c.blocks) else set()
    for s in (b.spelling for b in c.attentions):
        found |= {"cross-attention"} if s.cross else set()
        found |= {"grouped-query"} if s.kv_heads < s.heads else set()
        found |= {f"{s.returns} used outside"} if s.returns != "output" else set()
        found |= {"late division"} if s.softmax in ("late", "later") else set()
    return found
