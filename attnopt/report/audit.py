"""The result of ``attnopt.diff``: a model's attentions beside those of a file that was exported from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnopt.base.display import shown

Verdict = Literal["same", "differs", "not compared"]
Setting = Literal["example", "longer", "alone"]
EXIT_CODES: dict[Verdict, int] = {"same": 0, "differs": 1, "not compared": 2}


@dataclass(frozen=True)
class Effect:
    """How much the output of an attention changes: the norm of the difference, relative to that of the model's output.

    ``setting``: "example", on the example's tokens; "longer", both models whole on an example made longer; "alone", this
    attention with random queries, keys and values.
    """

    tokens: int
    error: float
    setting: Setting


@dataclass(frozen=True)
class Difference:
    """``kind``: "window", "causal", "padding", "mask", "bias", "sinks", "softcap", "scale", "positions", "norms", "heads",
    "head-order", "kv-map", "head-size", "queries", "keys", "values", "inputs", "features", "missing" or "extra".  ``model`` and
    ``file``: what either has."""

    kind: str
    model: str
    file: str
    effect: Effect | None = None


@dataclass(frozen=True)
class ComparedSite:
    """An attention of the model, of the file, or of both.  ``model`` and ``file`` are their specs as text, empty where there is
    none; ``tokens``: the lengths at which they were compared; ``why``: what prevented it."""

    name: str
    where: str
    file_name: str
    verdict: Verdict
    model: str = ""
    file: str = ""
    differences: tuple[Difference, ...] = ()
    tokens: tuple[int, ...] = ()
    why: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedOutputs:
    """The outputs of both models whole, in torch and in ONNX Runtime: the largest relative difference, and what rounding
    explains; ``tolerance`` None: not judged, since the file computes in fewer bits."""

    tokens: int
    error: float
    tolerance: float | None

    @property
    def differs(self) -> bool:
        return self.tolerance is not None and not self.error <= self.tolerance


@dataclass(frozen=True)
class Audit:
    """``sites``: those of the model in the order in which they run, then those that only the file has.  Prints as a table."""

    file: str
    sites: tuple[ComparedSite, ...]
    outputs: tuple[ComparedOutputs, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """ "differs" if an attention or an output does, otherwise "not compared" if something was not."""
        if any(s.verdict == "differs" for s in self.sites) or any(o.differs for o in self.outputs):
            return "differs"
        return "not compared" if not self.sites or any(s.verdict != "same" for s in self.sites) else "same"

    @property
    def exit_code(self) -> int:
        """0 for "same", 1 for "differs", 2 for "not compared"."""
        return EXIT_CODES[self.verdict]

    def __str__(self) -> str:
        return shown(self, "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {"verdict": self.verdict, **asdict(self)}
