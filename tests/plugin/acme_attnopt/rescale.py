"""A compensation: how the output projection makes up for lost heads."""

from typing import ClassVar

from attnopt import AttentionSpec, Compensation, HeadWeights, Rewrite, Site


class Rescale(Compensation):
    """The heads that are left count more, as after dropout."""

    name: ClassVar[str] = "acme.rescale"
    needs_calibration: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    def compensate(self, site: Site, spec: AttentionSpec) -> Rewrite:
        factor = site.num_heads / spec.num_heads
        weights = [(h, w) for h in spec.heads if (w := site.head_weight("out", h)) is not None]
        edits = tuple(HeadWeights("out", h, w * factor) for h, w in weights)
        return Rewrite(spec, edits, notes=(f"output weights times {factor:.3g}",))
