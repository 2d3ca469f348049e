"""The laws of the design, on models of transformers and timm that nobody wrote for attnopt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from torch import Tensor, nn

import attnopt
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import PerHead, Sinks, Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' and timm's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@dataclass(frozen=True)
class Subject:
    entry: zoo.Entry
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: list[Tensor]

    def optimized(self, policy: Any, **options: Any) -> attnopt.OptimizedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnopt.AttnoptWarning)
            return attnopt.optimize(self.model, policy, self.args, self.kwargs, **options)

    def run(self, fast: attnopt.OptimizedModel) -> list[Tensor]:
        return oracle.run(fast, self.args, self.kwargs)

    def meant(
        self, fast: attnopt.OptimizedModel, edit: Callable[[tuple[int, ...]], oracle.Edit], refused: str = ""
    ) -> list[Tensor]:
        """What the oracle makes of it, where sites that refused are left alone; only ``refused`` may have refused."""
        applied: list[bool] = []
        for s in fast.report.sites:
            assert {r.code for r in s.refusals.values()} <= {refused}, s.refusals
            assert (s.status == "rewritten") != bool(s.refusals)
            applied.append(not s.refusals)
        assert any(applied)

        def edits(n: int, shape: tuple[int, ...]) -> oracle.Edit | None:
            return edit(shape) if applied[n] else None

        return oracle.run_edited(self.model, self.args, self.kwargs, edits)


@pytest.fixture(scope="module", params=zoo.ENTRIES, ids=lambda e: e.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    entry: zoo.Entry = request.param
    model, args, kwargs = entry.build()
    return Subject(entry, model, args, kwargs, oracle.run(model, args, kwargs))


def per_head(mask: Tensor, heads: int, only: int) -> Tensor:
    made = torch.ones(heads, *mask.shape, dtype=torch.bool)
    made[only] = mask
    return made


# ---------------------------------------------------------------- laws 1, 8: found and fused
def test_law_fuse_changes_nothing(subject: Subject) -> None:
    before = {k: (v.data_ptr(), v.clone()) for k, v in subject.model.state_dict().items()}
    fast = subject.optimized("fuse")
    entry = subject.entry
    assert len(fast.sites) == entry.sites == oracle.normalisers(subject.model, subject.args, subject.kwargs)
    assert fast.sites[0].num_heads == entry.heads
    assert fast.sites[0].num_kv_heads == (entry.kv_heads or entry.heads)
    assert sum(s.is_cross for s in fast.sites) == entry.cross
    assert [s.name for s in fast.sites] == [s.name for s in fast.report.sites]
    modules = dict(subject.model.named_modules())
    assert all(s.name.partition("#")[0] in modules for s in fast.sites)
    oracle.assert_same(subject.run(fast), subject.own)
    after = subject.model.state_dict()
    assert all(
        v.data_ptr() == p and torch.equal(v, old) for (p, old), v in zip(before.values(), after.values(), strict=True)
    )
    shared = {v.data_ptr() for v in fast.state_dict().values() if v.numel()}
    assert shared & {p for p, _ in before.values()}, "unchanged weights are shared"


# ---------------------------------------------------------------- law 2
def test_law_a_long_window_changes_nothing(subject: Subject) -> None:
    fast = subject.optimized(LocalWindow(100, 100))
    oracle.assert_same(subject.run(fast), subject.own)
    assert sum(bool(s.refusals) for s in fast.report.sites) == subject.entry.cross


def test_law_sparse_is_its_mask(subject: Subject) -> None:
    pattern = Window(2, 1) | Sinks(1)
    fast = subject.optimized(Sparse(PerHead({1: pattern})))

    def edit(shape: tuple[int, ...]) -> oracle.Edit:
        kv_len = shape[-2]  # self-attention: as many keys as queries (a sink's column is no key)
        return oracle.Edit(per_head(oracle.visible(pattern, shape[-2], kv_len, 1), fast.sites[0].num_heads, 1))

    want = subject.meant(fast, edit, "needs-self-attention")
    oracle.assert_same(subject.run(fast), want)
    oracle.assert_differs(want, subject.own)


# ---------------------------------------------------------------- laws 3, 5, 6
def test_law_pruning_zeroes_heads_and_removes_their_weights(subject: Subject) -> None:
    H = subject.entry.heads
    fast = subject.optimized(PruneHeads(heads=[0, 2]))
    gains = tuple(0.0 if h in (0, 2) else 1.0 for h in range(H))
    want = subject.meant(fast, lambda _: oracle.Edit(gains=gains))
    oracle.assert_same(subject.run(fast), want)
    oracle.assert_differs(want, subject.own)
    assert all(s.spec.heads == tuple(h for h in range(H) if h not in (0, 2)) for s in fast.sites)
    before = sum(p.numel() for p in subject.model.parameters())
    after = sum(p.numel() for p in fast.parameters())
    found = attnopt.inspect(subject.model, subject.args, subject.kwargs).sites
    known = all(p.rows is not None for site in found for p in site.projections.values())
    kept = {h: [g for i, g in enumerate(s.spec.kv_of_head) if i not in (0, 2)] for h, s in enumerate(found)}
    gone = sum(
        2 * (2 * s.head_dim + 2 * (s.num_kv_heads - len(set(kept[i]))) * s.head_dim) for i, s in enumerate(found)
    )  # at least two columns of each row of queries, outputs, keys and values
    assert before - after >= (gone if known else 0)


def test_law_gains_scale_head_outputs(subject: Subject) -> None:
    gains = (1.0, -0.5, 2.0, 0.0)
    fast = subject.optimized(ScaleHeads(gains))
    oracle.assert_same(subject.run(fast), subject.meant(fast, lambda _: oracle.Edit(gains=gains)))
    oracle.assert_same(subject.run(subject.optimized(ScaleHeads((1.0,) * 4))), subject.own)


def test_law_passes_compose(subject: Subject) -> None:
    window, prune = LocalWindow(2, 1, sinks=1), PruneHeads(heads=[1])
    gains = (1.0, 0.0, 1.0, 1.0)
    results = []
    for policy in ([window, prune], [prune, window]):
        fast = subject.optimized(policy)
        results.append(subject.run(fast))
        refused = [bool(s.refusals) for s in fast.report.sites]
        assert sum(refused) == subject.entry.cross
        assert all(s.status == "rewritten" for s in fast.report.sites), "pruning applies to each"
        assert all(s.spec.heads == (0, 2, 3) for s in fast.sites)

        def edit(n: int, shape: tuple[int, ...], refused: list[bool] = refused) -> oracle.Edit:
            mask = oracle.visible(window._pattern(False), shape[-2], shape[-2], 1)
            return oracle.Edit(None if refused[n] else mask, gains)

        oracle.assert_same(results[-1], oracle.run_edited(subject.model, subject.args, subject.kwargs, edit))
    oracle.assert_same(results[0], results[1])


# ---------------------------------------------------------------- law 4
def test_law_as_many_groups_as_heads_changes_nothing(subject: Subject) -> None:
    fast = subject.optimized(GroupedQuery(kv_heads=subject.entry.kv_heads or subject.entry.heads))
    oracle.assert_same(subject.run(fast), subject.own)


def test_law_grouping_equal_heads_changes_nothing() -> None:
    model, args, kwargs = zoo.roberta()
    for layer in model.encoder.layer:
        for linear in (layer.attention.self.key, layer.attention.self.value):
            for p in (linear.weight, linear.bias):
                heads = p.data.view(4, 6, -1)
                heads[1], heads[3] = heads[0], heads[2]
    fast = attnopt.optimize(model, GroupedQuery(kv_heads=2), args, kwargs)
    oracle.assert_same(oracle.run(fast, args, kwargs), oracle.run(model, args, kwargs))
    assert [s.num_kv_heads for s in fast.sites] == [2, 2]
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in fast.parameters()) == 2 * 2 * 12 * 25


# ---------------------------------------------------------------- law 7: backends, save, load, ONNX
@pytest.fixture(scope="module", params=["electra", "qwen3", "mbart", "gpt_oss"])
def rewritten(request: pytest.FixtureRequest) -> tuple[Subject, attnopt.OptimizedModel]:
    model, args, kwargs = zoo.BY_NAME[request.param].build()
    subject = Subject(zoo.BY_NAME[request.param], model, args, kwargs, oracle.run(model, args, kwargs))
    return subject, subject.optimized([LocalWindow(3, 0), PruneHeads(heads=[3]), ScaleHeads({1: 0.5})])


def test_law_reference_backend_gives_the_same(rewritten: tuple[Subject, attnopt.OptimizedModel]) -> None:
    subject, fast = rewritten
    plain = subject.optimized([LocalWindow(3, 0), PruneHeads(heads=[3]), ScaleHeads({1: 0.5})], backend="reference")
    assert {s.backend for s in plain.report.sites} == {"reference"}
    oracle.assert_same(subject.run(plain), subject.run(fast))


def test_law_save_and_load_give_the_same_bits(
    rewritten: tuple[Subject, attnopt.OptimizedModel], tmp_path: Path
) -> None:
    subject, fast = rewritten
    fast.save(tmp_path / "saved")
    again = attnopt.load(tmp_path / "saved")
    oracle.assert_same(subject.run(again), subject.run(fast), limit=0.0)
    assert [s.spec for s in again.sites] == [s.spec for s in fast.sites]
    assert [s.projections for s in again.sites] == [s.projections for s in fast.sites]
    assert again.report == fast.report


@pytest.mark.parametrize("name", ["electra", "qwen3"])
def test_law_onnx_runtime_gives_the_same(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, args, kwargs = zoo.BY_NAME[name].build()
    fast = attnopt.optimize(model, [LocalWindow(3, 1), PruneHeads(heads=[0])], args, kwargs)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    values = [*args, *kwargs.values()]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), values, strict=True)}
    got = [torch.from_numpy(o) for o in session.run(None, feed)]
    oracle.assert_same(got, oracle.run(fast, args, kwargs), limit=1e-3)


# ---------------------------------------------------------------- law 1 at other sizes
def _resized(x: Tensor, batch: int, length: int) -> Tensor:
    """Token ids, or a padding mask, of another size."""
    return zoo.padded(batch, length) if int(x.max()) <= 1 else zoo.ids(batch=batch, length=length)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in zoo.ENTRIES if e.dynamic], ids=lambda e: e.name)
def test_law_other_sizes(entry: zoo.Entry) -> None:
    model, args, kwargs = entry.build()
    fast = attnopt.optimize(model, "fuse", args, kwargs, dynamic_shapes="auto")
    windowed = attnopt.optimize(model, LocalWindow(2, 1), args, kwargs, dynamic_shapes="auto")
    for batch, length in ((3, 13), (2, 9), (2, 5)):
        a = tuple(_resized(x, batch, length) for x in args)
        k = {n: _resized(x, batch, length) for n, x in kwargs.items()}
        oracle.assert_same(oracle.run(fast, a, k), oracle.run(model, a, k), f"{batch} x {length}")
        edit = oracle.Edit(Window(2, 1).mask(length, length)[0])
        want = oracle.run_edited(model, a, k, dict.fromkeys(range(entry.sites), edit))
        oracle.assert_same(oracle.run(windowed, a, k), want, f"windowed, {batch} x {length}")
    assert fast.report.fixed_axes == ()


# ---------------------------------------------------------------- models of their own kind
def test_half_precision() -> None:
    model, args, kwargs = zoo.roberta()
    model = model.to(torch.bfloat16)
    for policy, edit in (("fuse", oracle.Edit()), (PruneHeads(heads=[1]), oracle.Edit(gains=(1.0, 0.0, 1.0, 1.0)))):
        fast = attnopt.optimize(model, policy, args, kwargs)
        got = oracle.run(fast, args, kwargs)
        assert {t.dtype for t in got} == {torch.bfloat16}
        oracle.assert_same(got, oracle.run_edited(model, args, kwargs, {0: edit, 1: edit}))


def test_dataclass_output() -> None:
    model, args, kwargs = zoo.roberta()
    fast = attnopt.optimize(model, "fuse", args, kwargs)
    with torch.no_grad():
        want, got = model(*args, **kwargs), fast(*args, **kwargs)
    assert type(got) is type(want)
    assert list(got) == list(want)
    oracle.assert_same([got.last_hidden_state], [want.last_hidden_state])


def test_talking_heads_are_not_pruned() -> None:
    """CaiT mixes heads around the softmax: its class attentions are rewritten, the others refused."""
    model, args, kwargs = zoo.cait()
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), args, kwargs)
    assert [(s.name, s.spec.mixes_heads) for s in fast.sites] == [
        ("blocks.0.attn", True), ("blocks_token_only.0.attn", False), ("blocks_token_only.1.attn", False),
    ]  # fmt: skip
    assert [s.status for s in fast.report.sites] == ["refused", "rewritten", "rewritten"]
    want = oracle.run_edited(model, args, kwargs, {n: oracle.Edit(gains=(1.0, 0.0, 1.0, 1.0)) for n in (1, 2)})
    oracle.assert_same(oracle.run(fast, args, kwargs), want)
    assert not fast.report.near_misses


def test_twins_windows() -> None:
    """Windows of tokens in the batch axis, and keys from a pooled map."""
    model, args, kwargs = zoo.twins()
    own = oracle.run(model, args, kwargs)
    fast = attnopt.optimize(model, "fuse", args, kwargs)
    assert len(fast.sites) == oracle.normalisers(model, args, kwargs)
    oracle.assert_same(oracle.run(fast, args, kwargs), own)
    pruned = attnopt.optimize(model, PruneHeads(heads=[0]), args, kwargs)
    want = oracle.run_edited(model, args, kwargs, lambda n, shape: oracle.Edit(gains=(0.0, *(1.0,) * (shape[-3] - 1))))
    oracle.assert_same(oracle.run(pruned, args, kwargs), want)
