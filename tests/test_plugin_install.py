"""A third party's distribution is installed and used like the built-in passes and backends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

USE = """
import torch, attnopt, tiny_models
model, args = tiny_models.causal()
model.eval()
window = attnopt.optimize(model, "local-window(left=3, right=0)", args)
last = attnopt.optimize(model, "acme.last-k(keys=4)", args, backend="acme.plain")
assert [site.status for site in last.report.sites] == ["rewritten"] * 2, str(last.report)
assert {site.backend for site in last.report.sites} == {"acme.plain"}, str(last.report)
with torch.no_grad():
    torch.testing.assert_close(last(*args), window(*args))
    assert not torch.allclose(last(*args), model(*args))
model, args, kwargs = tiny_models.full()
refused = attnopt.optimize(model.eval(), "acme.last-k(keys=4)", args, kwargs)
assert refused.report.sites[0].refusals["acme.last-k"].code == "needs-causal", str(refused.report)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with acme-attnopt installed; built from a copy, because a build writes beside the source."""
    folder = tmp_path_factory.mktemp("acme")
    source = shutil.copytree(HERE / "plugin", folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run([*pip, "--target", str(folder / "site"), str(source)], dict(os.environ))
    path = [folder / "site", HERE.parent, HERE]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(environment: dict[str, str]) -> None:
    rows = json.loads(_run([sys.executable, "-m", "attnopt", "passes", "--json"], environment))
    found = {row["name"]: row for row in rows}
    assert {"acme.last-k", "acme.plain"} <= found.keys()
    assert found["acme.last-k"]["distribution"].startswith("acme-attnopt")
    assert "keys" in json.dumps(found["acme.last-k"]["options"])


def test_it_is_used_by_its_name(environment: dict[str, str]) -> None:
    _run([sys.executable, "-W", "ignore", "-c", USE], environment)
