"""Conditions: which attentions they choose, how they are written, and what a wrong one is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from policy_strategies import CONDITIONS
from sites import a_site

from attnopt import Policy, where
from attnopt.compiler.policy_text import read_where
from attnopt.compiler.where import Where
from attnopt.errors import PolicyError
from attnopt.ir.site import Site
from attnopt.passes import LocalWindow
from attnopt.patterns import Causal, Window


def named(name: str, **changes: Any) -> Site:
    return replace(a_site(**changes), name=name)


SITES = [  # an encoder of three layers, and a decoder of two with windows, cross-attention and sinks
    named("encoder.0", heads=4),
    named("encoder.1", heads=4, has_bias=True),
    named("encoder.2", heads=8, kv_heads=2),
    named("decoder.0.self", pattern=Causal()),
    named("decoder.0.cross", is_cross=True, kv_len=20),
    named("decoder.1.self", pattern=Causal() & Window(4, 0), has_sinks=True),
    named("decoder.1.cross", is_cross=True, kv_len=20, head_dim=5),
]
NAMES = [site.name for site in SITES]
SCORES = {
    "distance": {"encoder.0": [1, 2, 3, 6], "encoder.1": [8] * 4, "encoder.2": [2] * 8, "decoder.0.self": [0, 0, 1, 1]},
    "sink-mass": {name: [0.0, 0.25, 0.5, 0.75] for name in NAMES if name != "encoder.2"} | {"encoder.2": [1.0] * 8},
}


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        (where(), range(7)),
        (where(causal=True), [3, 5]),
        (where(causal=False, is_cross=False), [0, 1, 2]),
        (where(is_cross=True), [4, 6]),
        (where(bias=True), [1]),
        (where(window=True), [5]),
        (where(window=False, sinks=False, causal=True), [3]),
        (where(heads=8), [2]),
        (where(heads=">4"), [2]),
        (where(heads=(4, 8), kv_heads="<3"), [2]),
        (where(head_dim=">=5"), [6]),
        (where(value_dim=3, head_dim="<5", is_cross=True), [4]),
        (where(queries=12, keys=">12"), [4, 6]),
        (where(name="decoder.*"), [3, 4, 5, 6]),
        (where(name=["encoder.0", "*.cross"]), [0, 4, 6]),
        (where(layers=0), [0]),
        (where(layers=[-1, 0]), [0, 6]),
        (where(layers=slice(2, -2)), [2, 3, 4]),
        (where(layers="::3"), [0, 3, 6]),
        (where(is_cross=True, layers=0), [4]),  # the first of these, not of all
        (where(causal=True, layers=-1), [5]),
        (where(distance="<=3"), [0, 2, 3]),  # the mean over heads; it does not apply to the others
        (where(distance="<=3", layers=1), [2]),
        (where(sink_mass=0.375, distance=">3"), [1]),
        (where(statistics={"sink-mass": ">.9"}), [2]),
    ],
)
def test_what_is_chosen(condition: Where, chosen: list[int]) -> None:
    assert [*condition.among(SITES, SCORES)] == [NAMES[i] for i in chosen]
    assert set(condition.among(SITES, SCORES).values()) == {None}


def test_heads_inside_of_an_attention() -> None:
    assert where(is_cross=False).heads(distance="<2").among(SITES, SCORES) == {
        "encoder.0": (0,),
        "decoder.0.self": (0, 1, 2, 3),
    }
    both = where(distance="<4").heads(distance=">=1", sink_mass=">.25").among(SITES, SCORES)
    assert both == {"encoder.0": (2, 3), "encoder.2": tuple(range(8)), "decoder.0.self": (2, 3)}
    pruned = replace(SITES[0], spec=SITES[0].spec.keeping([1, 3]))
    scores = {"distance": {"encoder.0": [1.0, 5.0]}}
    assert where().heads(distance=">2").among([pruned], scores) == {
        "encoder.0": (3,)
    }  # its number in the trained model


def test_the_expected_number() -> None:
    condition = where(is_cross=True)
    assert condition.expect(2).among(SITES, {}) == condition.among(SITES, {})
    assert where(heads=3).expect(0).among(SITES, {}) == {}
    with pytest.raises(PolicyError) as caught:
        where(causal=True, window=True).expect(12).among(SITES, {})
    assert str(caught.value) == (
        "where(causal=True, window=True).expect(12) matches 1 of 7 attentions, expected 12: 'decoder.1.self'\n"
        "  hint: 'encoder.0' has causal=False; 'encoder.1' has causal=False; 'encoder.2' has causal=False; "
        "'decoder.0.self' has window=False; 'decoder.0.cross' has causal=False; 'decoder.1.cross' has causal=False"
    )


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (where(heads=3), "where(heads=3) matches 0 of 7 attentions\n  hint: 'encoder.0' has heads=4; "),
        (where(name="encodr.*"), "'decoder.1.self' has another name; ..."),
        (where(distance=">9"), "'encoder.0' has distance=3; 'encoder.1' has distance=8;"),
        (where(distance=">9"), "'decoder.0.cross' has no distance; "),
        (where(layers="9:"), "'encoder.0' is outside of layers=9:; "),
        (where(is_cross=False).heads(distance=">9"), "'encoder.0' has no head with distance='>9'; "),
        (where(causal=True, layers=[0, 2, -3]), "there is no layer 2, -3: 2 attentions meet the other conditions"),
    ],
)
def test_conditions_that_nothing_meets(condition: Where, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        condition.among(SITES, SCORES)
    assert message in str(caught.value)
    assert str(condition) in str(caught.value)


def test_a_model_without_attentions_is_no_fault_of_a_condition() -> None:
    assert where(causal=True).among([], {}) == {}
    with pytest.raises(PolicyError, match="matches 0 of 0 attentions, expected 2"):
        where().expect(2).among([], {})


# ---------------------------------------------------------------- how they are written
@given(CONDITIONS)
def test_what_it_prints_reads_back(condition: Where) -> None:
    assert read_where(str(condition)) == condition
    policy = Policy({condition: "local-window(left=3)"})
    assert Policy.from_json(policy.to_json()) == policy
    hash(policy)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("where()", where()),
        ("where(causal=True, layers=2:-2)", where(layers=slice(2, -2), causal=True)),
        ("where(layers=-3:)", where(layers=slice(-3, None))),
        ("where( layers='::2' , causal=True ) . expect( 12 )", where(causal=True, layers="::2").expect(12)),
        (
            "where(sink-mass='>.2').heads(qk-rank='<8')",
            where(sink_mass=">.2").heads(qk_rank="<8"),
        ),
        ("where(name=['a).heads(', 'layers=2:3)'])", where(name=["a).heads(", "layers=2:3)"])),
        (
            "where(statistics={'distance(prefix=1, grid=[3, 4])': '<3'})",
            where(statistics={"distance((3, 4), 1)": "<3"}),
        ),
    ],
)
def test_texts(text: str, condition: Where) -> None:
    assert read_where(text) == condition
    assert Policy.of({text: "local-window(3)"}) == Policy({condition: LocalWindow(3)})


def test_how_it_prints() -> None:
    condition = where(name="a.*", causal=True, layers=slice(2, -2), heads=">8", head_dim=(32, 64), sink_mass="<.5")
    assert str(condition.heads(distance="<8").expect(12)) == (
        "where(name='a.*', causal=True, heads='>8', head_dim=(32, 64), layers=2:-2, sink_mass='<0.5')"
        ".heads(distance='<8').expect(12)"
    )
    assert str(where(statistics={"distance(prefix=1)": "<3"})) == "where(statistics={'distance(prefix=1)': '<3'})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("where(casual=True)", "unknown condition 'casual'\n  hint: did you mean causal?"),
        ("where(causal=1)", "where: invalid value causal=1: expected True or False"),
        ("where(causal='cross')", "where: invalid value causal='cross': expected True or False"),
        ("where(heads='12')", "where: invalid value heads='12': expected a comparison"),
        ("where(layers='x')", "where: invalid value layers='x': expected integers or a slice"),
        ("where(layers=1:2:0)", "where: invalid value layers=slice(1, 2, 0): expected integers or a slice"),
        ("where(layers=1.5)", "where: invalid value layers=1.5: expected a sequence of integers"),
        ("where(name=3)", "where: invalid value name=3: expected names of attentions, or globs"),
        ("where(name=[])", "where: invalid value name=(): expected names of attentions, or globs"),
        ("where(True)", "where: too many positional arguments"),
        ("where(distance=True)", "where: invalid value distance=True: expected a finite number"),
        ("where(statistics=3)", "where: invalid value statistics=3: expected bounds by names of methods"),
        ("where(statistics={3: 4})", "where: 3 is not the name of a method"),
        ("where(statistics={'distance(grid=-1)': 4})", "distance: invalid value grid=-1"),
        ("where(sink_mass=1, statistics={'sink-mass': 2})", "duplicate key 'sink-mass'"),
        ("where(retrieval='>1')", "missing a required argument: 'needles'"),
        ("where(counterfactual='>1')", "where: statistics='counterfactual': "),
        ("where(causal=True, causal=True)", "duplicate key 'causal'"),
        ("where().heads()", "where: heads needs statistics, once"),
        ("where().heads(distance=1).heads(entropy=1)", "where: heads needs statistics, once"),
        ("where().expect()", "expect: missing a required argument"),
        ("where().expect(-1)", "where: invalid value expect=-1"),
        ("where().__class__", "'where()' is not a name"),
        ("where().among(3)", "is not a name"),
        ("where(), fuse", "unknown name 'fuse' in a condition"),
        ("where() & where()", "cannot be combined"),
        ("where(), where()", "is not a condition"),
        ("where(", "cannot read 'where('"),
        ("where(__import__('os'))", "unknown name '__import__' in a condition"),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.of({text: "fuse"})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"rule {text!r}: ")


def test_the_model_is_asked_before_names_are() -> None:
    policy = Policy({where(causal=True): "fuse"})
    with pytest.raises(PolicyError, match=r"where\(causal=True\) chooses among all attentions of a model"):
        policy.passes_for("layers.0")
