"""Files from elsewhere: damaged, hostile or huge ones are refused by name; nothing in them runs, and memory stays bounded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import Attention

import attnopt
from attnopt.archive.folder import GRAPH, WEIGHTS
from attnopt.archive.untrusted_graph import NotAGraphError, _is_operator, check_graph
from attnopt.base.atomic_files import MARKER
from attnopt.passes import LocalWindow

FILES = (GRAPH, WEIGHTS, MARKER)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a dynamic batch and length."""
    folder = tmp_path_factory.mktemp("original") / "saved"
    torch.manual_seed(0)
    model, x = Attention(causal=False).eval(), torch.randn(2, 12, 16)
    attnopt.optimize(model, LocalWindow(3), (x,), dynamic_shapes="auto").save(folder)
    return folder


@pytest.fixture(scope="module")
def bench(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage: one for all examples, which each put it right first."""
    folder = tmp_path_factory.mktemp("bench") / "saved"
    shutil.copytree(original, folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would run or write would do so here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("exploded*")), "something in the file was run"


def restored(original: Path, bench: Path) -> Path:
    for name in FILES:
        (bench / name).write_bytes((original / name).read_bytes())
    return bench


def sealed(folder: Path) -> None:
    """Digests that fit, as a hostile file has them."""
    about = json.loads((folder / MARKER).read_text())
    about.pop("self_sha256", None)
    about["sha256"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (GRAPH, WEIGHTS)}
    about["self_sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (folder / MARKER).write_text(json.dumps(about))


def refused(folder: Path) -> str:
    with pytest.raises(attnopt.ArchiveError) as caught:
        attnopt.load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- damage
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@QUICK
def test_one_bit_flipped(original: Path, bench: Path, name: str, place: float, bit: int) -> None:
    folder = restored(original, bench)
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (folder / name).write_bytes(data)
    refused(folder)


@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=8))
@QUICK
def test_truncated(original: Path, bench: Path, name: str, share: float, more: bytes) -> None:
    folder = restored(original, bench)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)] + more)
    refused(folder)


@given(name=st.sampled_from(FILES), data=st.binary(max_size=200))
@QUICK
def test_something_else(original: Path, bench: Path, name: str, data: bytes) -> None:
    folder = restored(original, bench)
    (folder / name).write_bytes(data)
    refused(folder)


def test_files_of_two_saves(original: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = tmp_path / "other"
    attnopt.optimize(Attention(causal=False), LocalWindow(3), (torch.randn(2, 12, 16),)).save(other)
    shutil.copy(original / WEIGHTS, other / WEIGHTS)
    assert "checksum mismatch" in refused(other)


# ---------------------------------------------------------------- hostile, with digests that fit
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1 << 62, 1 << 63, 1 << 200]), st.floats(),
    st.text(max_size=8), st.sampled_from(["x" * 300, "open('exploded', 'w')", "torch.os.system", "9**9**9**9", "../exploded"]),
    st.just([]), st.just({}), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


def places(parsed: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    found: list[tuple[Any, Any]] = []
    stack = [parsed]
    while stack:
        here = stack.pop()
        pairs = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in pairs:
            found.append((here, key))
            stack.append(value)
    return found


@given(name=st.sampled_from([GRAPH, MARKER]), at=st.floats(0, 1, exclude_max=True), value=ODD, drop=st.booleans())
@settings(QUICK, max_examples=40)
def test_json_with_one_value_changed(original: Path, bench: Path, name: str, at: float, value: Any, drop: bool) -> None:
    """Refused, or harmless: what loads can be told apart from an honest file by nobody."""
    folder = restored(original, bench)
    parsed = json.loads((folder / name).read_text())
    found = places(parsed)
    container, key = found[int(at * len(found))]
    if drop:
        del container[key]
    else:
        container[key] = value
    (folder / name).write_text(json.dumps(parsed))
    sealed(folder)
    try:
        loaded = attnopt.load(folder)
    except attnopt.ArchiveError:
        return
    assert isinstance(loaded, attnopt.OptimizedModel)


ATTACK = "__import__('pathlib').Path('exploded').touch()"


def graph_with(folder: Path, change: Callable[[Any], None]) -> None:
    parsed = json.loads((folder / GRAPH).read_text())
    change(parsed)
    (folder / GRAPH).write_text(json.dumps(parsed))
    sealed(folder)


def of_signature(key: str, value: Any) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        graph["graph_module"]["module_call_graph"][0]["signature"][key] = value

    return change


def as_operator(target: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        node = graph["graph_module"]["graph"]["nodes"][-1]
        node["target"] = target

    return change


def reading_a_file(graph: Any) -> None:
    """Well formed: nothing but the name of the operator tells it from others."""
    node = graph["graph_module"]["graph"]["nodes"][-1]
    given = {"filename": {"as_string": "exploded"}, "shared": {"as_bool": True}, "size": {"as_int": 384}}
    node["target"] = "torch.ops.aten.from_file.default"
    node["inputs"] = [{"name": name, "arg": arg, "kind": 1} for name, arg in given.items()]


def named_input(name: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        text = json.dumps(graph["graph_module"])
        graph["graph_module"] = json.loads(text.replace('"x"', json.dumps(name)))

    return change


def spec(context: Any, kind: str = "collections.defaultdict") -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


ENUM = {"__enum__": True, "fqn": "this:s", "name": "x"}
FACTORY = {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []}
HOSTILE: dict[str, Callable[[Any], None]] = {
    "guards": lambda g: g.update(guards_code=[ATTACK]),
    "size": lambda g: g["graph_module"]["graph"]["sym_int_values"].update(s0={"as_expr": {"expr_str": ATTACK, "hint": None}}),
    "endless size": lambda g: g["graph_module"]["graph"]["sym_int_values"].update(
        s0={"as_expr": {"expr_str": "9**9**9**9", "hint": None}}
    ),
    "any function": as_operator("torch.os.system"),
    "a library": as_operator("torch.ops.load_library"),
    "a file": reading_a_file,
    "a packet": as_operator("torch.ops.aten.add"),
    "an unknown operator": as_operator("torch.ops.nowhere.op.default"),
    "input's name": named_input(f"x={ATTACK}"),
    "argument's name": of_signature("forward_arg_names", [f"x={ATTACK}"]),
    "imported module": of_signature("out_spec", spec(FACTORY)),
    "imported enum": of_signature("out_spec", spec(json.dumps([ENUM]), "builtins.dict")),
    "inputs' structure": of_signature("in_spec", spec(json.dumps([ATTACK]), "builtins.dict")),
    "deep structure": of_signature("out_spec", "[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_graphs(original: Path, bench: Path, attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = restored(original, bench)
    graph_with(folder, HOSTILE[attack])
    refused(folder)
    assert "this" not in sys.modules
    assert not capsys.readouterr().out


def test_operators_that_read_no_file_are_let_through() -> None:
    refused = set()
    for name in {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}:
        packet = getattr(torch.ops.aten, name, None)
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        refused |= {name for o in overloads if not _is_operator(o)}
    assert "from_file" in refused
    assert refused <= {"from_file", "save"}


def test_an_operator_with_a_path_of_numbers(tmp_path: Path) -> None:
    class Contracted(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bld,ed->ble", super().forward(x), self.o.weight)

    model, x = Contracted(causal=False).eval(), torch.randn(2, 12, 16)
    fast = attnopt.optimize(model, "fuse", (x,))
    fast.save(tmp_path / "saved")
    assert torch.equal(attnopt.load(tmp_path / "saved")(x), fast(x))


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("s0", True), ("2*s0 + 1", True), ("s0**2", True), ("Max(1, s0 - 3)", True), ("((s0 + 1)//2)*8", True),
        ("Eq(s0, 3)", True),
        ("Pow(Symbol('s0', positive=True, integer=True), Integer(2))", True), ("FloorDiv(s0, 2) % 4", True), ("s0 <= 9", True),
        ("2**s0", False), ("9**8", False), ("(2 + 2)**8", False), ("s0**9", False), ("Pow(Integer(9), Integer(8))", False),
        ("factorial(9)", False), ("s0.free_symbols", False), ("(lambda: 1)()", False), ("[s0]", False), ("f'{s0}'", False),
        ("Symbol('a b')", False), ("__name__", False), ("Max(*s0)", False), ("Max(**s0)", False), ("1 << s0", False), ("", False),
        ("+".join(["s0"] * 1000), False), ("(" * 500, False),
    ],
)  # fmt: skip
def test_sizes_are_arithmetic(text: str, is_fine: bool) -> None:
    graph = {"expr_str": text}
    if is_fine:
        check_graph(graph)
        return
    with pytest.raises(NotAGraphError):
        check_graph(graph)


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("L['x'].size()[1] == 3", True), ("(L['d']['t'].size()[0] + 3) // 4 != L['a'][0].size()[1]", True),
        ("max(0, L['x'].size()[1]) > 2 and not math.floor(L['x'].size()[0] / 2) == 1", True), ("L['x'].size()[1] ** 2 < 9", True),
        ("L['x\\\")+evil'].size()[1] == 3", False), ("L['x y'].size()[1] == 3", False), ("L['x'].data[1] == 3", False),
        ("L['x'].size == 3", False), ("L == 3", False), ("x.size()[1] == 3", False), ("2 ** L['x'].size()[1] == 3", False),
        ("9 ** 8 == 3", False), ("open('x')", False), ("math.sin(1)", False), ("max(*L['x'].size())", False), ("'a'", False),
        ("L['x'].size()[L['x'].size()[0]] == 1", False), ("(lambda: 1)()", False), ("", False), ("1; 2", False),
        ("1 == 1 # no more", False), ("(1 ==\n1)", False), ("-" * 1500 + "1", False), ("+".join(["1"] * 1500), False),
    ],
)  # fmt: skip
def test_guards_are_relations_between_sizes(text: str, is_fine: bool) -> None:
    graph = {"guards_code": [text]}
    if is_fine:
        check_graph(graph)
        return
    with pytest.raises(NotAGraphError):
        check_graph(graph)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch.save", "zip with paths"])
def test_other_archives(original: Path, bench: Path, tmp_path: Path, name: str, form: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (Path("exploded"),))

    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(Bomb(), buffer)
    elif form == "torch.save":
        torch.save({"weights": Bomb()}, buffer)
    else:
        with zipfile.ZipFile(buffer, "w") as packed:
            packed.writestr("../exploded", "x")
            packed.writestr("/tmp/exploded", "x")
    folder = restored(original, bench)
    (folder / name).write_bytes(buffer.getvalue())
    if name != MARKER:
        sealed(folder)
    refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_links_pipes_and_devices(original: Path, tmp_path: Path, name: str) -> None:
    """A link to a plain file is read as any; what could block or never end is not opened."""
    folder = tmp_path / "saved"
    shutil.copytree(original, folder)
    (folder / name).unlink()
    (folder / name).symlink_to(original / name)
    attnopt.load(folder)
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)):
        (folder / name).unlink() if not (folder / name).is_dir() else (folder / name).rmdir()
        make(folder / name)
        refused(folder)


# ---------------------------------------------------------------- bombs
MEMORY = 4 << 30  # bytes of address space; torch itself takes most of them

RUN = """
    import resource, sys
    import attnopt, attnopt.archive.save, torch._export.serde.serialize, safetensors.torch
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    for what in sys.argv[1:]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            attnopt.load(what) if not what.endswith(("yaml", "json")) else attnopt.Policy.of(what)
        except attnopt.AttnoptError as error:
            said = type(error).__name__ + " " + str(error).splitlines()[0]
        else:
            said = "fine"
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, said)
"""


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def huge_tensor(folder: Path) -> None:
    header = json.dumps({"t0": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 1 << 62]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def huge_input(folder: Path) -> None:
    def change(graph: Any) -> None:
        sizes = [{"as_int": 1 << 19}, {"as_int": 1 << 12}, {"as_int": 16}]  # 128 GiB
        graph["graph_module"]["graph"]["tensor_values"]["x"]["sizes"] = sizes

    graph_with(folder, change)


def deep_json(folder: Path) -> None:
    (folder / GRAPH).write_text("[" * (1 << 20))


def long_json(folder: Path) -> None:
    with (folder / GRAPH).open("wb") as file:
        file.truncate(1 << 40)  # a hole of 1 TiB takes no space on the disk


@pytest.mark.slow
@pytest.mark.subprocess
def test_bombs(original: Path, tmp_path: Path) -> None:
    """Read one after the other in a process of limited memory: each is refused by name and costs little."""
    bombs = [huge_header, huge_tensor, huge_input, deep_json, long_json]
    for bomb in bombs:
        folder = tmp_path / bomb.__name__
        shutil.copytree(original, folder)
        bomb(folder)
        if bomb is not long_json:
            sealed(folder)
    laughs = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(20))
    rules, passes = {str(n): [] for n in range(80_000)}, [*["fuse"] * 40_000, "fuze"]
    policies = {
        "laughs.yaml": laughs, "letters.yaml": "a" * (1 << 19), "quotes.yaml": "a" + "'\\" * (1 << 18) + "\n",
        "rules.json": json.dumps(rules | {"x": "fuze"}), "passes.json": json.dumps(passes),
    }  # fmt: skip
    for name, text in policies.items():
        (tmp_path / name).write_text(text)
    names = [*(b.__name__ for b in bombs), *policies]
    source = textwrap.dedent(RUN).format(memory=MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", source, *(str(tmp_path / n) for n in names)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        used, said = line.split(" ", 1)
        assert int(used) < 200, line
        assert said.startswith(("ArchiveError", "PolicyError")), line
        assert str(tmp_path / name) in said
