"""A captured model with calibration data, to be run with some of its heads ablated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from attnopt.base.call_inputs import CallInputs
from attnopt.ir.site import Site

Loss = Callable[[Any, CallInputs], Tensor]  # (the model's output, the batch as args and kwargs) -> a scalar
ToLogits = Callable[[Any], Tensor]  # the model's output -> logits [..., classes]

KINDS = ("zero", "mean", "uniform", "resample")


class HeadProbe(ABC):
    """What an importance of the whole model may ask.  ``off`` names heads by site and place in ``site.spec.heads``."""

    batches: Sequence[CallInputs]  # the calibration data, as the captured graph takes them
    more: Sequence[CallInputs]  # the batches that the importance has brought
    loss: Loss | None
    behaviour: ToLogits | None
    seed: int

    @property
    @abstractmethod
    def heads(self) -> Mapping[str, Sequence[int]]:
        """Of each site by name the numbers of its heads, in the order in which the sites run."""

    @abstractmethod
    def sites(self, batches: Sequence[CallInputs] | None = None) -> Iterator[Site]:
        """The sites in this order, each with its activations on ``batches``, by default the calibration data.  Only one
        has activations at a time."""

    @abstractmethod
    def output(self, batch: CallInputs, off: Mapping[str, Sequence[int]] | None = None, kind: str = "zero") -> Any:
        """The model's output with the outputs of some heads replaced, before the output projection.

        ``kind``: by "zero"; by their "mean" over the tokens of the calibration data that are no padding; by the mean of the
        values of all visible keys, which is what "uniform" attention weights give; or by "resample": what they are at the
        same position of another sequence of the batch.
        """

    @abstractmethod
    def sweep(
        self, batch: CallInputs, kind: str = "zero", off: Mapping[str, Sequence[int]] | None = None
    ) -> Iterator[tuple[str, int, Any]]:
        """For each head that is not in ``off``: its site and place, and the output with it and ``off`` replaced, as of
        ``output``.  What comes before a site is computed once, what follows for several heads together."""

    @abstractmethod
    def slopes(self, loss: Loss, repeats: int = 1) -> Mapping[str, Tensor]:
        """For each site the derivatives [batches * repeats, heads] of the loss with respect to factors on heads' outputs."""
