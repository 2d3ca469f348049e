"""The parts of a comparison with a file: masks, pairs of attentions, inputs, and verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import audited
import onnx
import torch
from audited import Layer, Model
from torch import Tensor, nn

import attnopt
from attnopt.audit.inputs import _lengthened
from attnopt.audit.pairs import paired
from attnopt.audit.scores import score_differences
from attnopt.audit.seen import Apart, Seen, ahead
from attnopt.audit.trace import Attended
from attnopt.ir.operands import Operands
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.report.audit import Audit, ComparedOutputs, ComparedSite, Difference


def seen_of(hidden: Tensor, added: Tensor) -> Seen:
    return Seen(hidden, added, ~hidden.all(-1, keepdim=True))


def test_a_bias_that_is_shifted_for_a_query_is_the_same() -> None:
    hidden = torch.ones(1, 2, 5, 5, dtype=torch.bool).triu(1)
    added = torch.randn(1, 2, 5, 5).masked_fill(hidden, 0.0)
    shifted = (added + torch.arange(5.0)[:, None]).masked_fill(hidden, 0.0)
    assert Apart.of(seen_of(hidden, added), seen_of(hidden, shifted)).added < 1e-5
    assert Apart.of(seen_of(hidden, added), seen_of(hidden, 2 * added)).added > 0.1


def test_rows_that_the_model_hides_as_a_whole_are_no_difference() -> None:
    hidden = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    hidden[..., 1, :] = True
    apart = Apart.of(seen_of(hidden, torch.zeros(1, 1, 3, 4)), seen_of(hidden & False, torch.zeros(1, 1, 3, 4)))
    assert not apart.dropped.any()
    back = Apart.of(seen_of(hidden & False, torch.zeros(1, 1, 3, 4)), seen_of(hidden, torch.zeros(1, 1, 3, 4)))
    assert int(back.more.sum()) == 4


def test_the_last_query_is_at_the_last_key() -> None:
    pairs = torch.zeros(2, 5, dtype=torch.bool)
    pairs[0, 4] = True
    assert ahead(pairs) == (True, False)
    assert ahead(pairs.roll(1, 0)) == (False, True)


def test_what_counts_goes_on_counting() -> None:
    assert _lengthened(torch.arange(4).expand(2, -1), 1, 7).tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert _lengthened(torch.tensor([[5, 3, 9]]), 1, 5).tolist() == [[5, 3, 9, 5, 3]]
    assert _lengthened(torch.ones(1, 2), 1, 6).unique().numel() == 3


def site(heads: int, dim: int = 8, length: int = 12) -> Site:
    spec = AttentionSpec.of(heads, heads, dim, dim, scale=1.0)
    return Site("s", spec, {}, parameters={}, q_len=length, kv_len=length)


def test_attentions_without_weights_are_paired_by_order_and_form() -> None:
    assert paired([site(4), site(2)], [site(4), site(2)]) == [(0, 0), (1, 1)]
    assert paired([site(4), site(2), site(4)], [site(4), site(4)]) == [(0, 0), (1, None), (2, 1)]
    assert paired([site(4)], [site(2), site(4)]) == [(0, 1), (None, 0)]
    assert paired([site(4)], [site(3)]) == [(0, 0)]
    assert paired([site(4), site(2), site(3)], [site(2), site(4), site(3)]) == [(0, 1), (1, 0), (2, 2)]  # two towers


def attended(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    spec = AttentionSpec.of(q.shape[1], k.shape[1], 8, 8, scale=0.3)
    return Attended(spec, Operands(q, k, v), torch.zeros_like(q))


def test_heads_that_are_swapped_are_told_as_such() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in "qkv")
    order = [1, 0, 2]
    (found,) = score_differences(attended(q, k, v), attended(q[:, order], k[:, order], v[:, order]), 1e-3)
    assert (found.kind, found.file) == ("head-order", "heads 1, 0, 2")


def test_a_scale_that_another_operand_has_is_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in "qkv")
    assert score_differences(attended(q, k, v), attended(4 * q, k / 4, v), 1e-3) == []
    (found,) = score_differences(attended(q, k, v), attended(2 * q, k, v), 1e-3)
    assert (found.kind, found.model, found.file) == ("scale", "0.3", "0.6")


def test_what_the_file_does_not_read_is_not_missing(tmp_path: Path) -> None:
    """Scores and weights in a branch."""
    model, args = Model(Layer(kv=4)), audited.inputs()
    path = audited.by_script(model, args, tmp_path / "plain.onnx")
    found = onnx.load(path)
    softmax = next(n for n in found.graph.node if n.op_type == "Softmax")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", [softmax.input[0]], ["weights_inside"], axis=-1)],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("weights_inside", onnx.TensorProto.FLOAT, None)],
    )
    found.graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor(True).numpy(), "is_so"))
    branch = onnx.helper.make_node("If", ["is_so"], list(softmax.output), then_branch=inner, else_branch=inner)
    nodes = [branch if n is softmax else n for n in list(found.graph.node)]
    nodes = [n.__deepcopy__() for n in nodes]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    onnx.save(found, path)
    audit = attnopt.diff(model, path, args)
    assert [s.verdict for s in audit.sites] == ["not compared"]
    assert "opaque-operator" in audit.sites[0].why
    assert audit.exit_code == 2
    assert audit.outputs[0].tokens == args[0].shape[1]


class _Gained(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Tensor:
        return self.model(input_ids, attention_mask) * 1.5


def test_a_difference_elsewhere_is_one(tmp_path: Path) -> None:
    model, args = Model(Layer()), audited.inputs()
    path = audited.by_script(_Gained(model), args, tmp_path / "other.onnx")
    audit = attnopt.diff(model, path, args)
    assert [s.verdict for s in audit.sites] == ["same"]
    assert audit.verdict == "differs"
    assert "no attention does" in audit.notes[-1]


def test_the_verdict_of_all() -> None:
    same = ComparedSite("a", "", "b", "same")
    lost = replace(same, verdict="differs", differences=(Difference("window", "w", "none"),))
    unread = replace(same, verdict="not compared", why="because")
    assert [Audit("f", sites).exit_code for sites in ((same,), (same, unread, lost), (same, unread), ())] == [
        0,
        1,
        2,
        2,
    ]
    assert Audit("f", (same,), (ComparedOutputs(4, 1.0, None),)).verdict == "same"  # in few bits
    assert Audit("f", (same,), (ComparedOutputs(4, float("nan"), 1e-3),)).verdict == "differs"
