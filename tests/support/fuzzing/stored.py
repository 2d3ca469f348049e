"""Cases that once failed, kept as files and replayed by every test run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from places import ROOT

from fuzzing.grammar import Case, from_json, to_json

FOLDER = ROOT / "tests" / "laws" / "regressions"


def stored() -> list[tuple[str, Case]]:
    """(name, case) of every file."""
    return [(p.stem, from_json(json.loads(p.read_text(encoding="utf-8")))) for p in sorted(FOLDER.glob("*.json"))]


def store(case: Case) -> Path:
    """Write the case under a name made from its content."""
    text = json.dumps(to_json(case), indent=1) + "\n"
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    path.write_text(text, encoding="utf-8")
    return path
