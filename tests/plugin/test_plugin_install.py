"""A third party's distribution is installed, and each kind of thing in it used on every path."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT, SUPPORT
from tiny_llama import tiny_llama

import attnopt
from attnopt.passes import Sparse
from attnopt.patterns import Window
from attnopt.patterns.registry import PATTERNS

HERE = Path(__file__).parent

USE = """
import sys, torch, attnopt, tiny_models
model, args = tiny_models.causal()
model.eval()
window = attnopt.optimize(model, "local-window(left=3, right=0)", args)
last = attnopt.optimize(model, "acme.last-k(keys=4)", args, backend="acme.plain")
assert [site.status for site in last.report.sites] == ["rewritten"] * 2, str(last.report)
assert {site.backend for site in last.report.sites} == {"acme.plain"}, str(last.report)
with torch.no_grad():
    torch.testing.assert_close(last(*args), window(*args))
    assert not torch.allclose(last(*args), model(*args))
several = attnopt.Policy({
    attnopt.where(causal=True, statistics={"acme.l1": ">0"}): "first-of(grouped-query(kv_heads=7), acme.last-k(keys=4))"
})
several.save(sys.argv[1])
first = attnopt.optimize(model, sys.argv[1], args, backend="acme.plain")
assert [site.passes for site in first.report.sites] == [("acme.last-k",)] * 2, str(first.report)
model, args, kwargs = tiny_models.full()
refused = attnopt.optimize(model.eval(), "acme.last-k(keys=4)", args, kwargs)
assert refused.report.sites[0].refusals["acme.last-k"].code == "needs-causal", str(refused.report)
"""


POLICIES = {  # and what reports say of them
    "acme.last-k(keys=4)": "Window(left=3, right=0)",
    "sparse(pattern=Every(n=3) | Window(left=1, right=0))": "Every(3)",
    "acme.clip(bound=0.1)": "Clipped",
    "dynamic-sparse(scores='keynorm', keep=0.5, block=64)": "KeyNorm()",
    "dynamic-sparse(scores='usual-key', keep=0.5, block=64)": "UsualKey()",
    "prune-heads(fraction=0.5, importance='acme.l1')": "by the importance acme.l1",
    "prune-heads(fraction=0.5, importance='acme.peak', budget='site')": "by the importance acme.peak",
    "prune-heads(fraction=0.5, importance='acme.diagonal(width=3)', budget='site')": "the importance acme.diagonal(width=3)",
    "grouped-query(kv_heads=2, grouping='acme.strided')": "key/value heads {0, 2} {1, 3} merged by mean",
    "grouped-query(kv_heads=1, merge='acme.median')": "merged by acme.median",
    "prune-heads(heads=[1], compensate='acme.rescale')": "prune-heads: output weights times 1.33",
    "grouped-query(kv_heads=2, compensate='acme.rescale')": "grouped-query: output weights times 1",
    "query-rows(score='key-alike', keep=0.5)": "50% of the rows by KeyAlike()",
    "replace(mixer='acme.neighbours(step=2)')": "acme.neighbours(step=2) in the place of attention",
}
LEARNING = (  # refused without data
    "dynamic-sparse(scores='usual-key', keep=0.5, block=64)",
    "prune-heads(fraction=0.5, importance='acme.peak', budget='site')",
    "prune-heads(fraction=0.5, importance='acme.diagonal(width=3)', budget='site')",
    "replace(mixer='acme.neighbours(step=2)')",
)

EVERY_PATH = """
import json, sys, torch, attnopt, tiny_models
from pathlib import Path
from attnopt.compiler.explain import explain
torch.manual_seed(0)
torch.set_num_threads(1)
args = (torch.randn(2, 12, 16),)
policies, root, learning = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for number, (policy, told) in enumerate(policies.items()):
    print(policy, file=sys.stderr, flush=True)  # what fails is in the last one
    folder = root / str(number)
    folder.mkdir()
    model = tiny_models.Attention(16, 4, causal=not policy.startswith(("query-rows", "replace"))).eval()
    chosen = attnopt.Policy.of(policy)
    assert attnopt.Policy.from_json(chosen.to_json()) == chosen
    given = {"calibration": [args]} if policy in learning else {}
    reference = attnopt.optimize(model, policy, args, backend="reference", **given)
    for backend in ("auto", "blocked"):
        fast = attnopt.optimize(model, policy, args, backend=backend, **given)
        assert [s.status for s in fast.report.sites] == ["rewritten"], str(fast.report)
        torch.testing.assert_close(fast(*args), reference(*args))
        assert told in str(fast.report), str(fast.report)
        fast.save(folder / "saved")
        assert torch.equal(attnopt.load(folder / "saved")(*args), fast(*args))
    fast.report.to_html(folder / "report.html")
    fast.export_onnx(folder / "model.onnx")
    (found,) = explain(model, "(root)", args, {})
    assert {"acme.clip", "backend acme.plain"} <= set(found.accepted), found
    assert "acme.last-k" not in found.accepted, found
    (found,) = explain(model, "(root)", args, {}, chosen)
    name = policy.partition("(")[0]
    assert name in (found.refusals if policy in learning else found.accepted), found
assert len(attnopt.inspect(model, args).sites) == 1
"""

NOT_INSTALLED = """
import json, sys, attnopt
from pathlib import Path
for number, missing in enumerate(json.loads(sys.argv[1])):
    try:
        attnopt.load(Path(sys.argv[2]) / str(number) / "saved")
    except attnopt.ArchiveError as error:
        assert f"the saved model needs {missing} of acme-attnopt: unknown " in str(error), error
        assert error.hint.startswith("install acme-attnopt, or import the module that registers it"), error
    else:
        assert not missing
"""
MISSING = (  # policy by policy
    "", "pattern 'Every'", "head edit 'acme.clipped'", "block score 'KeyNorm'", "block score 'UsualKey'", *[""] * 7,
    "row score 'KeyAlike'", "mixer 'acme.neighbours'",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with acme-attnopt installed; built from a copy, because a build writes beside the source."""
    folder = tmp_path_factory.mktemp("acme")
    source = shutil.copytree(HERE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run([*pip, "--target", str(folder / "site"), str(source)], dict(os.environ))
    path = [folder / "site", ROOT, SUPPORT]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.subprocess
def test_it_is_listed(environment: dict[str, str]) -> None:
    rows = json.loads(_run([sys.executable, "-m", "attnopt", "passes", "--json"], environment))
    found = {row["name"]: row for row in rows}
    assert {"acme.last-k", "acme.plain", "acme.peak", "acme.strided", "acme.median", "acme.rescale"} <= found.keys()
    assert found["acme.last-k"]["distribution"].startswith("acme-attnopt")
    assert "keys" in json.dumps(found["acme.last-k"]["options"])


@pytest.mark.slow
@pytest.mark.subprocess
def test_it_is_used_by_its_name(environment: dict[str, str], tmp_path: Path) -> None:
    _run([sys.executable, "-W", "ignore", "-c", USE, str(tmp_path / "policy.yaml")], environment)


@pytest.mark.slow
@pytest.mark.subprocess
def test_every_kind_on_every_path(environment: dict[str, str], tmp_path: Path) -> None:
    quiet = [sys.executable, "-W", "ignore", "-c"]
    _run([*quiet, EVERY_PATH, json.dumps(POLICIES), str(tmp_path), json.dumps(LEARNING)], environment)
    without = {**environment, "PYTHONPATH": os.pathsep.join(environment["PYTHONPATH"].split(os.pathsep)[1:])}
    _run([*quiet, NOT_INSTALLED, json.dumps(MISSING), str(tmp_path)], without)


@pytest.mark.slow
def test_a_pattern_in_a_converted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    from acme_attnopt import Every

    monkeypatch.setattr(PATTERNS, "_registered", {})
    model = tiny_llama(2)
    ids, policy = torch.randint(50, (1, 12)), Sparse(Every(3) | Window(1, 0))
    with pytest.raises(
        attnopt.ConversionError, match=r"pattern .*Every\(3\).* is not reproduced by attnopt.patterns.parse"
    ):
        attnopt.convert(model, policy, (ids,))
    attnopt.register(Every)
    converted = attnopt.convert(model, policy, (ids,))
    fast = attnopt.optimize(model, policy, (ids,), {"use_cache": False})
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, fast(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(converted(ids).logits, model(ids).logits, atol=1e-2)


def test_the_example_imports_what_is_public() -> None:
    """And shows each kind in at most twenty lines."""
    for file in (HERE / "acme_attnopt").glob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert {m for m in imported if m.startswith("attnopt")} <= {"attnopt"}
        for cls in (n for n in tree.body if isinstance(n, ast.ClassDef)):
            assert cls.end_lineno is not None
            assert cls.end_lineno - cls.lineno < 20, cls.name
