"""Policy files from elsewhere: whatever is in one, it is read and reads back, or is refused by name; nothing in it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_strategies import GLOBS, POLICIES

from attnopt import AttnoptError
from attnopt.compiler.policy import Policy
from attnopt.passes import ScaleHeads

BOUNDED = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
EVIL = [
    "exploded",
    "__import__('pathlib').Path('exploded').touch()",
    "\x1b[2J\x07",
    "x" * 5000,
    "\ud800",
    "a: &b *b",
    "p.yaml",
]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1 << 62, 1 << 64, 10**350, -(10**350)]), st.floats(),
    st.text(max_size=8), st.sampled_from(EVIL), st.dates(),
)  # fmt: skip
NAMES = [
    "fuse", "local-window", "sparse", "dynamic-sparse", "prune-heads", "grouped-query", "scale-heads", "route-heads",
    "soft-pag", "head-patch", "steer", "add-values", "pass", "left", "right", "sinks", "dilation", "heads", "pattern",
    "fraction", "importance", "delta", "tokens", "alpha", "hidden_below",
    "compensate", "kv_heads", "grouping", "merge", "gains", "keep", "block", "scores", "shared", "active", "router",
    "replacement", "amount", "Causal", "Window", "Blocks", "PerHead", "Global", "Segments", "BlockLayout", "Neighborhood",
    "RandomBlocks", "data", "shape", "dtype", "kind", "pool-keys", "mix-map", "map", "gate", "size", "grid", "prefix",
    "evict-keys", "method", "budget", "recent", "pool",
    "choice", "first-of", "none", "where", "layers", "causal", "distance", "expect", "statistics",
]  # fmt: skip
DOCUMENTS = st.recursive(
    ODD | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(GLOBS | st.sampled_from(NAMES) | st.sampled_from(EVIL), inner, max_size=4)
    ),
    max_leaves=12,
)
TOKENS = st.sampled_from(
    [
        *NAMES,
        *"()[]{},=&|~-:.*'\"\\",
        "1",
        "-3",
        "1e-5",
        "0x1f",
        "1j",
        "'",
        '"""',
        "f'{1}'",
        "lambda: 1",
        "**",
        "None",
        "...",
        "nan",
    ]
)
WRITERS: list[tuple[str, Callable[[Any], str]]] = [
    ("p.json", json.dumps),
    ("p.yaml", lambda data: yaml.safe_dump(data, allow_unicode=True, sort_keys=False)),
]


def read(file: Path, data: bytes) -> Policy | None:
    """The policy, which reads back; None where the file is refused by its name, in words that a terminal can show."""
    file.write_bytes(data)
    try:
        policy = Policy.of(file)
    except AttnoptError as error:
        said = str(error)
        assert said.startswith(f"{file}: ")
        assert len(said) < 2000
        assert said.replace("\n", "").isprintable(), said
        return None
    finally:
        assert sorted(p.name for p in file.parent.iterdir()) == [file.name]
        file.unlink()
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    return policy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places(parsed: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    pairs = parsed.items() if isinstance(parsed, dict) else enumerate(parsed) if isinstance(parsed, list) else ()
    return [found for key, value in pairs for found in [(parsed, key), *places(value)]]


@given(POLICIES, st.sampled_from(WRITERS))
@BOUNDED
def test_what_is_written_reads_back(folder: Path, policy: Policy, writer: Any) -> None:
    name, write = writer
    assert read(folder / name, write(policy.to_json()).encode()) == policy


@given(
    POLICIES,
    st.sampled_from(WRITERS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
@BOUNDED
def test_damaged_bytes(folder: Path, policy: Policy, writer: Any, flips: list[tuple[float, int]], kept: float) -> None:
    name, write = writer
    data = bytearray(write(policy.to_json()).encode())
    for place, byte in flips:
        data[int(place * (len(data) - 1))] ^= byte
    read(folder / name, bytes(data[: int(len(data) * (0.5 + kept))]))


@given(
    POLICIES,
    st.sampled_from(WRITERS),
    st.floats(0, 1, exclude_max=True),
    DOCUMENTS,
    st.sampled_from(["value", "key", "drop"]),
)
@BOUNDED
def test_one_thing_changed(folder: Path, policy: Policy, writer: Any, at: float, other: Any, how: str) -> None:
    name, write = writer
    data = policy.to_json()
    if found := places(data):
        container, key = found[int(at * len(found))]
        value = container.pop(key) if how != "value" else None
        if how == "value":
            container[key] = other
        elif how == "key" and isinstance(container, dict):
            container[str(other)] = value
    read(folder / name, _written(write, data))


@given(DOCUMENTS, st.sampled_from(WRITERS))
@BOUNDED
def test_any_document(folder: Path, document: Any, writer: Any) -> None:
    name, write = writer
    read(folder / name, _written(write, document))


@given(
    st.lists(TOKENS, max_size=12).map("".join),
    st.sampled_from(
        ["{}", "local-window({})", "sparse(pattern={})", "scale-heads(gains={})", "choice({}, fuse)", "first-of([{}])"]
    ),
)
@BOUNDED
def test_any_text(folder: Path, text: str, around: str) -> None:
    read(folder / "p.json", json.dumps({"*": around.format(text)}).encode())


@given(
    st.lists(TOKENS | st.sampled_from(["2:-2", "'<3'", "causal=True", ").heads(", ").expect("]), max_size=12).map(
        "".join
    ),
    st.sampled_from(
        ["where({})", "where(layers={})", "where().heads({})", "where().expect({})", "where(distance={}).expect(3)"]
    ),
)
@BOUNDED
def test_any_condition(folder: Path, text: str, around: str) -> None:
    read(folder / "p.json", json.dumps({around.format(text): "local-window(left=3)"}).encode())


def _written(write: Callable[[Any], str], document: Any) -> bytes:
    try:
        return write(document).encode("utf-8", "surrogatepass")
    except TypeError:  # JSON has no dates
        return json.dumps(document, default=str).encode()


@pytest.mark.parametrize("written", ["1e-6", "-1e4", "2E+3", "1.5e2"])
def test_numbers_as_json_writes_them(tmp_path: Path, written: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(f"'*': [{{pass: scale-heads, gains: [{written}]}}]\n")
    assert Policy.of(file) == Policy.of({"*": ScaleHeads([float(written)])})
