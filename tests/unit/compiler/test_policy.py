"""Policies: every way to write one, which rule wins, and what a wrong one is told."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hypothesis import given
from policy_strategies import POLICIES

import attnopt
from attnopt.compiler.policy import Policy
from attnopt.errors import PolicyError
from attnopt.passes import (
    Fuse,
    GroupedQuery,
    LocalWindow,
    PruneHeads,
    ScaleHeads,
    SoftPAG,
    Sparse,
)
from attnopt.patterns import (
    Causal,
    Sinks,
    Window,
)


@given(POLICIES)
def test_json_reads_back(policy: Policy) -> None:
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.of(policy) is policy
    hash(policy)


@pytest.mark.parametrize(
    ("given_", "passes"),
    [
        (Fuse(), (Fuse(),)),
        ([Fuse(), LocalWindow(3)], (Fuse(), LocalWindow(3))),
        ("fuse", (Fuse(),)),
        ("fuse()", (Fuse(),)),
        ("", ()),
        ([], ()),
        ("local-window(left=128)", (LocalWindow(128),)),
        ("local-window(4, right=2)", (LocalWindow(4, 2),)),
        ("local_window(4)", (LocalWindow(4),)),
        (
            "prune-heads(heads=[0, 1]), scale-heads(gains=[1, -2.5])",
            (PruneHeads(heads=(0, 1)), ScaleHeads((1.0, -2.5))),
        ),
        ("scale-heads(gains={0: 2, 3: 0.5})", (ScaleHeads({0: 2.0, 3: 0.5}),)),
        ("sparse(pattern=Causal() & Window(3, 0))", (Sparse(Causal() & Window(3, 0)),)),
        ("sparse('Causal() & Window(3, 0)')", (Sparse(Causal() & Window(3, 0)),)),
        ("grouped-query(kv_heads=2, merge='first')", (GroupedQuery(2, "first"),)),
        ("scale-heads([1e-5, 2.5e-3]), soft-pag(u=1e-1)", (ScaleHeads((1e-5, 2.5e-3)), SoftPAG(u=0.1))),
        (["fuse", "local-window(3)", [Fuse()]], (Fuse(), LocalWindow(3), Fuse())),
        ({"pass": "local-window", "left": 16}, (LocalWindow(16),)),
        ([{"pass": "sparse", "pattern": "Sinks(2)"}], (Sparse(Sinks(2)),)),
    ],
)
def test_every_way_to_write_passes(given_: Any, passes: tuple[Any, ...]) -> None:
    assert Policy.of(given_) == Policy((("*", passes),))
    assert Policy.of({"a.*": given_}).passes_for("a.b") == passes


def test_which_rule_wins() -> None:
    policy = Policy.of({"encoder.0": Fuse(), "*": LocalWindow(1), "encoder.*": LocalWindow(2), "decoder.*.cross": []})
    assert policy.passes_for("encoder.0") == (Fuse(),)  # an exact name, though later globs match
    assert policy.passes_for("encoder.1") == (LocalWindow(2),)  # the last glob
    assert policy.passes_for("decoder.1") == (LocalWindow(1),)
    assert policy.passes_for("decoder.1.cross") == ()
    assert policy.passes_for("") == (LocalWindow(1),)  # the root module
    assert Policy.of({"encoder.*": "fuse"}).passes_for("decoder") == ()
    assert Policy.of({"": "fuse"}).passes_for("") == (Fuse(),)
    assert Policy.of({"": "fuse"}).passes_for("a") == ()
    assert Policy.of({"Encoder": "fuse"}).passes_for("encoder") == ()


def test_globs_that_match_nothing() -> None:
    policy = Policy.of({"encoder.*": "fuse", "decodr.*": "fuse", "": "fuse", "a[0]": "fuse"})
    assert policy.unmatched(iter(["encoder.0", "a[0]"])) == ["decodr.*", ""]


YAML = """
"*": fuse
"encoder.*": local-window(left=16)
decoder.0:
  - prune-heads(heads=[0, 1])
  - {pass: local-window, left: 16}
decoder.1: {pass: sparse, pattern: "Causal() & Window(3, 0)"}
"decoder.*.cross": []
"""


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(YAML)
    policy = Policy.of("p.yaml")
    assert policy == Policy.of(tmp_path / "p.yaml")
    assert policy.rules == (
        ("*", (Fuse(),)),
        ("encoder.*", (LocalWindow(16),)),
        ("decoder.0", (PruneHeads(heads=[0, 1]), LocalWindow(16))),
        ("decoder.1", (Sparse(Causal() & Window(3, 0)),)),
        ("decoder.*.cross", ()),
    )
    (tmp_path / "p.yml").write_text("fuse")
    assert Policy.of("p.yml") == Policy.of("fuse")
    (tmp_path / "p.json").write_text('{"encoder.*": [{"pass": "local-window", "left": 16}]}')
    assert Policy.of("p.json") == Policy.of({"encoder.*": LocalWindow(16)})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a: fuze", "p.yaml: rule 'a': there is no pass 'fuze'; there are fuse, local-window,"),
        ("p.yaml", "a: fuze", "hint: did you mean fuse?"),
        ("p.yaml", "a: {pass: local-window, left: -1}", "p.yaml: rule 'a': local-window: left=-1 is not possible"),
        ("p.yaml", "a: &x [fuse]\nb: *x", "p.yaml: line 2: aliases (*name) are not read; write the value out"),
        ("p.yaml", "a: fuse\na: []", "p.yaml: line 2: 'a' stands twice"),
        ("p.yaml", "a: [", "p.yaml: is not YAML: "),
        ("p.yaml", "1: fuse", "p.yaml: rule 1: a site name must be text"),
        ("p.yaml", "a:", "p.yaml: rule 'a': None is not a pass"),
        ("p.yaml", "", "p.yaml: None is not a pass"),
        ("p.yaml", "p.yaml", "p.yaml: there is no pass 'p.yaml'"),  # a file that names itself
        (
            "p.yaml",
            "a: !!python/object/apply:os.system [x]",
            "p.yaml: line 1: tags (!name) are not read; write a plain",
        ),
        ("p.yaml", "a: !!bool maybe", "p.yaml: line 1: tags (!name) are not read"),
        ("p.yaml", "a: 2001-99-99", "p.yaml: month must be in 1..12"),
        ("p.yaml", "a:\n- {pass: local-window, left: 1, left: 2}", "p.yaml: line 2: 'left' stands twice"),
        ("p.yaml", "a: local-window(left=1, left=2)", "p.yaml: rule 'a': 'left' stands twice"),
        ("p.yaml", "a: 'scale-heads({0: 2, 0: 3})'", "p.yaml: rule 'a': 0 stands twice"),
        (
            "p.yaml",
            "a: 'scale-heads({({},): 2})'",
            "p.yaml: rule 'a': a mapping's key must be a number, a text or a tuple",
        ),
        ("p.yaml", "a: local-window(-0x" + 90 * "f" + ")", "p.yaml: rule 'a': a number of 360 bits is too large"),
        ("p.yaml", "a: 0x" + 999 * "f", "p.yaml: line 1: a number of 1001 characters is too long"),
        ("p.yaml", "a: 1" + 300 * ":1" + ".5", "p.yaml: line 1: a number of 603 characters is too long"),
        ("p.yaml", "a: 1" + 190 * ":1" + ".5", "p.yaml: int too large to convert to float"),
        ("p.json", '{"a": 1' + 400 * "0" + "}", "p.json: a number of 401 characters is too long"),
        ("p.json", '{"a": {"pass": "scale-heads", "gains": [1' + 350 * "0" + "]}}", "give a finite number"),
        ("p.json", "[" * 200 + "]" * 200, "p.json: is nested too deeply"),
        (
            "p.json",
            '{"a": {"pass": "prune-heads", "fraction": 0.5, "whole_layers": 1}}',
            "whole_layers=1 is not possible",
        ),
        ("p.json", '{"a": {"pass": "' + 9999 * "x" + '"}}', "p.json: rule 'a': there is no pass 'xxx"),
        ("p.yaml", "[" * 5000, "p.yaml: is nested too deeply"),
        ("p.json", "[" * 200_000, "p.json: is nested too deeply"),
        ("p.json", '{"a": "fuse", "a": []}', "p.json: 'a' stands twice"),
        ("p.json", "{", "p.json: Expecting property name"),
        ("p.yaml", "#" * (1 << 20) + "#", "p.yaml: 1048577 bytes are too many for a policy; at most 1048576 are read"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(PolicyError) as caught:
        Policy.of(name)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.yaml: cannot be read: .*No such file"):
        Policy.of("nowhere.yaml")
    with pytest.raises(PolicyError, match=r"p\.txt: a policy file ends in \.yaml, \.yml, \.json"):
        Policy.of(tmp_path / "p.txt")
    with pytest.raises(PolicyError, match=r"cannot be read: embedded null byte"):
        Policy.of("\0.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(PolicyError, match=rf"{name}\.yaml: cannot be read: it is no plain file"):
            Policy.of(tmp_path / f"{name}.yaml")
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PolicyError, match=r"p\.yaml: cannot be read: 'utf-8' codec"):
        Policy.of(tmp_path / "p.yaml")


def python_says(text: str) -> str:
    """The words for a syntax error, which are not the same in every version."""
    with pytest.raises(SyntaxError) as error:
        ast.parse(text, mode="eval")
    return error.value.msg


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("local-windw(left=1)", "there is no pass 'local-windw'; there are fuse, local-window, sparse,"),
        ("local-windw(left=1)", "did you mean local-window?"),
        (
            "local-window(lft=1)",
            "local-window: got an unexpected keyword argument 'lft'\n  hint: local-window takes left, right,",
        ),
        ("local-window", "local-window: missing a required argument: 'left'"),
        ("fuse(1)", "fuse: too many positional arguments\n  hint: fuse takes no arguments"),
        ("local-window(left=", f"cannot read 'local-window(left=': {python_says('f(left=)')}"),
        ("fuse; fuse", "cannot read 'fuse; fuse'"),
        ("__import__('os').system('true')", "is not a name"),
        ("open('x')", "there is no pass 'open'"),
        ("sparse(pattern=Causl())", "there is no pattern 'Causl'; there are Full, Causal,"),
        ("Causal()", "Causal() in 'Causal()' is not a pass\n  hint: a pattern goes into sparse(pattern=...)"),
        ("soft-pag | soft-pag", "'soft_pag' cannot be joined with &, | or ~\n  hint: only patterns can"),
        ("sparse(pattern=fuse)", "sparse: pattern=Fuse() is not possible; give one of attnopt.patterns or its text"),
        (3, "3 is not a pass\n  hint: give a pass, a list of passes, or text such as 'local-window(left=8)'"),
        ([{"left": 3}], "{'left': 3} names no pass\n  hint: write it as "),
        ({"pass": "fuse", 3: 4}, "fuse: options must be names, not [3]"),
        ({"pass": "local-window", "lft": 4}, "local-window: got an unexpected keyword argument 'lft'"),
        ({"a": [Fuse(), {"b": Fuse()}]}, "rule 'a': {'b': Fuse()} names no pass"),
    ],
)
def test_bad_policies_say_what_is_wrong(given_: Any, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.of(given_)
    assert message in str(caught.value)


def test_two_rules_for_one_glob() -> None:
    with pytest.raises(PolicyError, match="there are two rules for 'a'"):
        Policy((("a", (Fuse(),)), ("a", ())))


def test_a_rule_that_a_later_one_overrules_everywhere_is_told() -> None:
    policy = Policy.of({"layers.*": "fuse", "layers.0": [], "*": "local-window(left=1)", "nowhere": "fuse"})
    assert policy.overruled(["layers.0", "layers.1"]) == ["layers.*"]
    assert policy.overruled(["layers.0"]) == ["layers.*", "*"]
    model, args = tiny_models.causal()
    with pytest.warns(
        attnopt.AttnoptWarning, match=r"'layers\.\[0\]' in the policy decides no attention: .* the last counts"
    ):
        attnopt.optimize(model, {"layers.[0]": "fuse", "*": "fuse"}, args)
