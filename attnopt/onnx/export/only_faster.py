"""Which attentions of a file are worth new nodes."""

from __future__ import annotations

from torch import fx

from attnopt.compiler.origin import Origin
from attnopt.lower.lower import lower
from attnopt.onnx.export.choose_form import WITH_ATTENTION
from attnopt.onnx.export.mark import Marked, fastest, mark


def worthwhile(gm: fx.GraphModule, origin: Origin, contrib: bool, opset: int) -> fx.GraphModule:
    """The graph without rewrites that only fuse an attention and are not faster than the original nodes."""
    file = origin.file
    assert file is not None
    fused = {p.found.site.name: p for p in file.plans if p.changes_nothing}
    if not fused:
        return gm
    _, marked = mark(gm, fastest(contrib, opset), takes_apart=False)
    slow = {m.site.name for m in marked if m.site.name in fused and _is_no_faster(m, opset)}
    if not slow:
        return gm
    return lower(file.captured, [p for p in file.plans if p.found.site.name not in slow], joins=False)


def _is_no_faster(marked: Marked, opset: int) -> bool:
    """The file already has the dense form under a mask, or in plain operators."""
    return marked.form.kind == "Attention" and (opset < WITH_ATTENTION or not marked.site.is_bare)
