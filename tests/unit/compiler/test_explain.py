"""Explanations lead to the node that differs, and listings show what a policy changes."""

import re
from typing import Any

import odd_models
import pytest
import tiny_models
import torch
from decoys import NEVER, E, L
from models import Attention, Spelling, inputs

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.compiler.analyze import analyze
from attnopt.compiler.explain import Explanation, explain
from attnopt.compiler.policy import Policy
from attnopt.errors import AttnoptError
from attnopt.graph.listing import Hunk, differences, listing
from attnopt.graph.nodes import source_line
from attnopt.render.tables import to_text
from attnopt.render.trees import inspection_tree
from attnopt.report.inspection import Inspection


def explained(name: str, policy: Any = None) -> Explanation:
    model, args = odd_models.mixed()
    chosen = None if policy is None else Policy.of(policy)
    (found,) = explain(model.eval(), name, args, {}, chosen)
    return found


# ---------------------------------------------------------------- explanations
def test_a_near_miss_leads_to_the_node_that_differs() -> None:
    found = explained("cubed")
    assert found.kind == "near miss"
    assert [step.code.partition(" = ")[2].partition("(")[0] for step in found.steps] == ["softmax", "relu"]
    assert [step.differs for step in found.steps] == [False, True]
    assert ".relu().softmax(-1)" in found.steps[1].source
    assert re.fullmatch(r"decoys\.py:\d+", found.steps[1].where)
    assert found.refusals["matching"].code == "no-query-key-product"


def test_what_is_no_candidate_is_explained_too() -> None:
    found = explained("gate")
    assert found.kind == "no candidate"
    assert "linear" in found.steps[-1].code
    assert found.steps[-1].differs


def test_a_site_shows_its_operations_and_who_objects() -> None:
    found = explained("stack.0", "prune-heads(heads=[7]), local-window(left=1)")
    assert found.spec == "2 heads x 8, self, Causal(), scale 0.3536"
    assert [step.code.split()[0] for step in found.steps] == ["matmul", "div", "masked_fill", "softmax", "matmul_1"]
    assert not any(step.differs for step in found.steps)
    assert found.refusals["prune-heads"].code == "unknown-head"
    assert "local-window" in found.accepted
    assert {"backend reference", "backend sdpa"} <= set(found.accepted)


def test_without_a_policy_the_built_in_passes_are_asked() -> None:
    assert {"fuse", "grouped-query"} <= set(explained("stack.1").accepted)
    spelling = Spelling(cross=True, softcap=5.0)
    (found,) = explain(Attention(spelling), "(root)", (), inputs(spelling))
    assert found.refusals["local-window"].code == "needs-self-attention"
    assert found.refusals["backend sdpa"].code == "no-softcap"
    assert "local-window" not in found.accepted


def test_returned_weights_are_marked() -> None:
    spelling = Spelling(returns="weights")
    (found,) = explain(Attention(spelling), "", (), inputs(spelling))
    assert [step.code.partition(" = ")[0] for step in found.steps if step.differs] == ["softmax"]


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(AttnoptError, match=r"did you mean 'stack.0'") as caught:
        explained("stack.00")
    assert caught.value.hint == "there are stack.0, stack.1, cubed, gate"
    with pytest.raises(AttnoptError, match="no attention 'a'") as caught:
        explain(torch.nn.Linear(2, 2), "a", (torch.zeros(1, 2),), {})
    assert caught.value.hint == "this model has no softmax and no fused attention"


@pytest.mark.parametrize("kind", NEVER, ids=lambda kind: kind.__name__)
def test_every_decoy_has_a_node_that_differs(kind: Any) -> None:
    model, args = kind().eval(), (torch.randn(2, L, E),)
    for r in analyze(model, CallInputs(args, {})).findings.rejected:
        named = re.match(r"(\w+) = ", r.refusal.found)
        assert r.node.name == named[1] if named else source_line(r.node) == r.refusal.where


# ---------------------------------------------------------------- differences
def hunks(policy: Any) -> list[Hunk]:
    model, args = tiny_models.causal()
    before = listing(capture(model.eval(), CallInputs(args, {})).module.graph)
    return list(differences(before, listing(attnopt.optimize(model, policy, args).graph_module.graph)))


def test_every_rewritten_site_has_its_own_place() -> None:
    found = hunks("local-window(left=3), prune-heads(heads=[1])")
    assert [(h.site, h.passes) for h in found] == [(f"layers.{i}", "local-window, prune-heads") for i in (0, 1)]
    lines = [f"{sign} {line.text}" for sign, line in found[0].lines]
    assert "- softmax = softmax(masked_fill, -1)  # 2x2x12x12" in lines
    assert any(line.startswith("+ ") and "self.layers.0.q_k_v.weight" in line and "# 2x12x24" in line for line in lines)
    assert lines[0] == "  x = input  # 2x12x16"


def test_every_change_is_told_once() -> None:
    model, args = tiny_models.causal()
    before = listing(capture(model.eval(), CallInputs(args, {})).module.graph)
    after = listing(attnopt.optimize(model, {"layers.1": "local-window(left=1)"}, args).graph_module.graph)
    found = list(differences(before, after))
    assert {h.site for h in found} == {"layers.1"}
    removed = [line.text for h in found for sign, line in h.lines if sign == "-"]
    assert len(set(removed)) == len(removed)
    assert all(line.module.startswith("layers.1") for h in found for sign, line in h.lines if sign != " ")


def test_equal_listings_differ_nowhere() -> None:
    model, args = tiny_models.causal()
    lines = listing(capture(model.eval(), CallInputs(args, {})).module.graph)
    assert list(differences(lines, lines)) == []


# ---------------------------------------------------------------- the tree
def test_layers_that_are_alike_are_drawn_once() -> None:
    model, args = odd_models.mixed()
    text = to_text(inspection_tree(attnopt.inspect(model.eval(), args)), width=200)
    assert text.splitlines()[0] == "2 attentions in 4 candidates, 1 near miss"
    assert re.search(
        r"stack\n│ +└── 0-1\n│ +└── 2 heads x 8, self, Causal\(\), scale 0.3536   tiny_models.py:\d+\n", text
    )
    assert "cubed\n    └── near miss [no-query-key-product]" in text


def test_a_tree_of_nothing_is_a_line() -> None:
    assert to_text(inspection_tree(Inspection((), (), 3))) == "0 attentions in 3 candidates"


def test_what_is_not_known_is_told_in_the_tree() -> None:
    spelling = Spelling(norm="across")
    text = to_text(inspection_tree(attnopt.inspect(Attention(spelling), (), inputs(spelling))), width=200)
    assert "k is unknown: heads cannot be separated" in text
