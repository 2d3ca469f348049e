"""What a way to score heads is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch

from attnopt.base.notation import shortened
from attnopt.base.progress import working
from attnopt.errors import PolicyError
from attnopt.ir.curves import Curves
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic


class Importance(ABC):
    """A score for each head of one site, from its weights and from what it computes on calibration data.

    One with options is a frozen dataclass, whose fields they are.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # the projections ("q", "k", "v", "out") whose rows have to be known
    needs_calibration: ClassVar[bool] = False  # ``scores`` reads ``site.activations``
    channels: ClassVar[bool] = False  # it also applies to attentions between channels

    @property
    def told(self) -> str:
        """What the report says that heads were removed by."""
        return f"the importance {shortened(self.to_json())}"

    def check(self, site: Site) -> Refusal | None:
        """Why it does not apply to ``site``, or None."""
        return None

    @abstractmethod
    def scores(self, site: Site) -> Sequence[float]:
        """One number for each head of ``site.spec.heads``; the highest are kept."""

    def profile(self, site: Site) -> Curves:
        """Many numbers for each head, such as the mass at each distance: for ``attnopt.head_profile``.  Raises PolicyError
        if there are none, as by default."""
        raise PolicyError(f"the importance {self.name!r} has one number for each head and no profile")

    def to_json(self) -> str:
        """The name, and the options that differ from their defaults: what texts and policy files read back."""
        if not is_dataclass(self):
            return self.name
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) != f.default}
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{self.name}({options})" if options else self.name


class ModelImportance(Importance):
    """A score for each head that needs the whole model: its output, its inputs, or other data beside the calibration.

    For ``attnopt.head_importance``; ``PruneHeads`` takes the result.
    """

    needs_calibration: ClassVar[bool] = True
    uses_loss: ClassVar[bool] = False  # reads ``probe.loss``
    needs_loss: ClassVar[bool] = False
    uses_behaviour: ClassVar[bool] = False  # reads ``probe.behaviour``

    @property
    def more(self) -> Sequence[Any]:
        """Batches that the model runs on beside the calibration data, in the same forms: ``probe.more``."""
        return ()

    @abstractmethod
    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        """For each site by name one number for each head."""

    def scores(self, site: Site) -> Sequence[float]:
        raise PolicyError(
            f"the importance {self.name!r} needs the whole model",
            hint="pass importance=attnopt.head_importance(model, data, ...)",
        )


class AblationImportance(ModelImportance):
    """How far the model moves when heads are ablated: one alone, or one beside others (``attnopt.greedy_heads``)."""

    kind: str  # of ablation, see ``HeadProbe.output``

    @abstractmethod
    def before(self, probe: HeadProbe) -> Any:
        """What is compared with: of the model as it is."""

    @abstractmethod
    def read(self, probe: HeadProbe, before: Any, batch: int, output: Any) -> Any:
        """What counts of the output on ``probe.batches[batch]`` with heads ablated; kept until all batches have run."""

    @abstractmethod
    def moved(self, before: Any, read: Sequence[Any]) -> float:
        """The distance of the model with these heads ablated from ``before``, by what was read of each batch."""

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        found = self.with_each(probe, self.before(probe))
        return {site: [found[site, place] for place in range(len(heads))] for site, heads in probe.heads.items()}

    def with_each(
        self, probe: HeadProbe, before: Any, off: Mapping[str, Sequence[int]] | None = None
    ) -> dict[tuple[str, int], float]:
        """The distance with ``off`` and each other head ablated, by its site and place."""
        gone = sum(map(len, (off or {}).values()))
        steps = len(probe.batches) * (sum(map(len, probe.heads.values())) - gone)
        found: dict[tuple[str, int], list[Any]] = {}
        with torch.no_grad(), working("ablating one head after another", steps) as step:
            for n, batch in enumerate(probe.batches):
                for site, place, output in probe.sweep(batch, self.kind, off):
                    found.setdefault((site, place), []).append(self.read(probe, before, n, output))
                    step()
        return {head: self.moved(before, read) for head, read in found.items()}


class Measured(Importance):
    """A statistic of calibration data that is one number for each head."""

    needs_calibration: ClassVar[bool] = True
    name: ClassVar[str] = "statistic"

    def __init__(self, statistic: Statistic[Any]) -> None:
        self.statistic = statistic

    def scores(self, site: Site) -> Sequence[float]:
        found = self.statistic.of(site)
        if isinstance(found, Curves):
            raise PolicyError(f"{self.statistic!r} has many numbers for each head", hint="use attnopt.head_profile")
        return [float(x) for x in found]

    def profile(self, site: Site) -> Curves:
        found = self.statistic.of(site)
        if isinstance(found, Curves):
            return found
        raise PolicyError(f"{self.statistic!r} measures {type(found).__name__}, expected attnopt.Curves")

    def to_json(self) -> str:
        return repr(self.statistic)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measured) and self.statistic == other.statistic

    def __hash__(self) -> int:
        return hash((Measured, self.statistic))
