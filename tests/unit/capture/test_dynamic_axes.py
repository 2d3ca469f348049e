"""Which axes vary: all that the model lets, named in any way, from examples of any length; the others are told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.base.sizes import is_static
from attnopt.capture.auto_axes import Limited
from attnopt.capture.capture import capture
from attnopt.capture.dynamic_axes import Auto
from attnopt.capture.second_example import longer_axes, repeated
from attnopt.capture.tensor_lengths import lengths_vary
from attnopt.capture.valid_sizes import cannot_vary
from attnopt.compiler.resized_inputs import resized
from attnopt.errors import AttnoptWarning, CalibrationError, CaptureError, ExportError
from attnopt.report.axis_text import told

FREE = {0: Dim.AUTO, 1: Dim.AUTO}


class Attend(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(16, 48), nn.Linear(16, 16), heads

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, as_dict: bool = True) -> Any:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (scale / q.shape[-1] ** 0.5)
        scores = scores if mask is None else scores + mask
        made = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return {"out": made} if as_dict else (made,)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attend()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Rest(Wrapped):
    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.inner(x, **kwargs)


class Nested(Wrapped):
    def forward(self, batch: Mapping[str, Any], **kwargs: Any) -> Any:
        return self.inner(batch["x"], *batch["masks"], **kwargs)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attend = nn.Conv2d(3, 16, 4, 4), Attend()

    def forward(self, image: Tensor) -> Any:
        return self.attend(self.patches(image).flatten(2).transpose(1, 2))


class ImageWithPositions(Image):
    """Only images of one number of patches go in."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 20, 16))

    def forward(self, image: Tensor) -> Any:
        return self.attend(self.patches(image).flatten(2).transpose(1, 2) + self.places)


class Squeezed(Wrapped):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, as_dict=False)[0].squeeze()


def causal(n: int, batch: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1).expand(batch, 1, n, n).clone()


def x(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 16)


def close(model: nn.Module, fast: nn.Module, args: Any = (), kwargs: Any = None) -> bool:
    got, want = (pytree.tree_leaves(m(*args, **(kwargs or {}))) for m in (fast, model))
    return all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, want, strict=True))


# ---------------------------------------------------------------- arguments under every name
FLAGS = {"as_dict": False}
CALLS: dict[str, tuple[type[nn.Module], Any, Any, Any]] = {
    "all by keyword": (Wrapped, lambda b, n: (), lambda b, n: {"x": x(b, n), "mask": causal(n, b), **FLAGS},
                       {"kwargs": {"x": FREE, "mask": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "as_dict": None}}),
    "all by position": (Wrapped, lambda b, n: (x(b, n), causal(n, b)), lambda b, n: {},
                        {"args": (FREE, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO})}),
    "both": (Wrapped, lambda b, n: (x(b, n),), lambda b, n: {"mask": causal(n, b), **FLAGS},
             {"args": (FREE,), "kwargs": {"mask": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "as_dict": None}}),
    "the rest": (Rest, lambda b, n: (), lambda b, n: {**FLAGS, "mask": causal(n, b), "x": x(b, n)},
                 {"x": FREE, "kwargs": {"mask": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}}}),
    "by name alone": (Rest, lambda b, n: (x(b, n),), lambda b, n: {"mask": causal(n, b)},
                      {"x": FREE, "mask": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}}),
    "nested": (Nested, lambda b, n: ({"masks": [causal(n, b)], "x": x(b, n)},), lambda b, n: FLAGS,
               {"batch": {"masks": [{0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}], "x": FREE}}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["static", "auto", "named"])
def test_arguments_that_land_in_kwargs(call: str, how: str, tmp_path: Path) -> None:
    kind, args, kwargs, shapes = CALLS[call]
    model = kind().eval()
    asked = {"static": None, "auto": "auto", "named": shapes}[how]
    fast = attnopt.optimize(model, "fuse", args(2, 5), kwargs(2, 5), dynamic_shapes=asked)
    assert [s.name for s in fast.sites] == ["inner"]
    fast.save(tmp_path / "saved")
    sizes = [(2, 5)] if how == "static" else [(2, 5), (3, 8), (1, 9)]
    for module in (fast, attnopt.load(tmp_path / "saved")):
        assert all(close(model, module, args(*s), kwargs(*s)) for s in sizes)
    if how == "static":
        with pytest.raises(CaptureError, match="captured for"):
            fast(*args(3, 5), **kwargs(3, 5))
    assert "forward" not in vars(model)
    assert type(model) is kind


def test_an_argument_of_no_name_is_refused() -> None:
    with pytest.raises(CaptureError, match="names unknown inputs token; the inputs are x, as_dict"):
        attnopt.optimize(Rest().eval(), "fuse", (x(2, 5),), FLAGS, dynamic_shapes={"x": FREE, "token": FREE})


def test_a_forward_of_the_instance_stays() -> None:
    model = Wrapped().eval()
    model.forward = (lambda own: lambda **kwargs: own(**kwargs))(model.forward)  # type: ignore[method-assign]
    own = model.forward
    fast = attnopt.optimize(model, "fuse", (), {"x": x(2, 5)}, dynamic_shapes="auto")
    assert close(model, fast, (), {"x": x(3, 7)})
    assert model.forward is own


# ---------------------------------------------------------------- every axis
def test_masks_of_four_axes_and_images_vary() -> None:
    fast = attnopt.optimize(Attend().eval(), "fuse", (x(2, 5), causal(5, 2)), dynamic_shapes="auto")
    assert fast.report.fixed_axes == ("x[2] = 16", "mask[1] = 1")
    model = Image().eval()
    fast = attnopt.optimize(model, "fuse", (torch.randn(2, 3, 16, 22),), dynamic_shapes="auto")
    assert all(close(model, fast, (torch.randn(1, 3, h, w),)) for h, w in ((24, 31), (33, 12), (17, 22)))
    assert "image[1] = 3" in fast.report.fixed_axes


def test_axes_that_cannot_vary_stay_fixed() -> None:
    """Height times width is given: other sizes of one side alone would be none."""
    model = ImageWithPositions().eval()
    fast = attnopt.optimize(model, "fuse", (torch.randn(2, 3, 16, 20),), dynamic_shapes="auto")
    assert close(model, fast, (torch.randn(5, 3, 16, 20),))
    with pytest.raises(CaptureError):
        fast(torch.randn(2, 3, 16, 24))


def test_what_cannot_vary_is_seen() -> None:
    class Tied(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum(2) + (1 if 2 * x.shape[2] == 12 and y.shape[2] % 3 == 0 else 0)

    program = capture(
        Tied(), CallInputs((torch.randn(2, 4, 6), torch.randn(2, 4, 9)), {}), {"x": {2: Dim.AUTO}, "y": {2: Dim.AUTO}}
    )
    assert cannot_vary(program) <= {(0, 2)}
    program = capture(Tied(), CallInputs((torch.randn(2, 4, 6), torch.randn(2, 4, 9)), {}), "auto")
    assert "x[2] = 6" in program.fixed_axes
    assert not any("y[2] =" in t for t in program.fixed_axes)


class Many(Attend):
    """Notes more about the height than anybody can read."""

    def forward(self, x: Tensor, **_: Any) -> Any:  # type: ignore[override]
        for i in range(1, 280):
            if (x.shape[2] * i + 1) % (i + 2) == 0:
                x = x + 1
        return super().forward(x.mean(2))


def test_too_much_to_say_of_sizes_leaves_the_first_two_axes() -> None:
    model = Many().eval()
    given = torch.randn(2, 5, 7, 16)
    fast = attnopt.optimize(model, "fuse", (given,), dynamic_shapes="auto")
    assert fast.report.fixed_axes == ("x[2] = 7", "x[3] = 16")
    assert close(model, fast, (torch.randn(3, 8, 7, 16),))
    with pytest.raises(Exception, match="relations between sizes"), Limited():  # it says so before torch is through
        torch.export.export(model, (given,), dynamic_shapes=({1: Dim.AUTO, 2: Dim.AUTO},))


def test_where_no_axis_can_vary_all_are_fixed() -> None:
    class Reads(Attend):
        def forward(self, x: Tensor, **_: Any) -> Any:  # type: ignore[override]
            known = [self.qkv.weight.new_zeros(3)[i] for i in range(int(str(x.shape[0])))]
            return super().forward(x * (1 + sum(known)) * [1, 1, 2, 3][x.shape[0]])

    model = Reads().eval()
    fast = attnopt.optimize(model, "fuse", (x(2, 5),), dynamic_shapes="auto")
    assert "x[0] = 2" in fast.report.fixed_axes
    assert close(model, fast, (x(2, 5),))
    with pytest.raises(CaptureError) as refused:
        fast(x(3, 5))
    assert "auto" not in str(refused.value)


# ---------------------------------------------------------------- an example of length 1
@pytest.mark.parametrize(
    ("given", "others", "fixed"),
    [
        ((x(1, 5),), [(x(3, 7),), (x(1, 9),)], ("x[2] = 16",)),
        ((x(1, 5), causal(5, 1)), [(x(3, 7), causal(7, 3)), (x(1, 8), causal(8, 1))], ("x[2] = 16", "mask[1] = 1")),
        ((x(3, 5), causal(5, 1)), [(x(4, 7), causal(7, 1))], ("x[2] = 16", "mask[0] = 1", "mask[1] = 1")),
        ((x(2, 1),), [(x(3, 7),), (x(1, 1),)], ("x[2] = 16",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("heads", [2, 4])
def test_an_axis_of_length_1_varies(
    given: Any, others: Any, fixed: tuple[str, ...], heads: int, tmp_path: Path
) -> None:
    model = Attend(heads).eval()
    fast = attnopt.optimize(model, "fuse", given, dynamic_shapes="auto")
    assert fast.report.fixed_axes == fixed
    fast.save(tmp_path / "saved")
    for module in (fast, attnopt.load(tmp_path / "saved")):
        assert all(close(model, module, args) for args in (given, *others))


class Counted(Attend):
    """The batch as ``len`` gives it, of a tensor and of a list."""

    def forward(self, x: Tensor, **_: Any) -> Any:  # type: ignore[override]
        made = super().forward(x, as_dict=False)[0]
        return made.reshape(len(x), -1) * len([x, x])


class CountedForAList(Attend):
    def forward(self, x: Tensor, **_: Any) -> Any:  # type: ignore[override]
        return torch.stack([super(CountedForAList, self).forward(x, as_dict=False)[0][i] for i in range(len(x))])


def test_a_batch_that_len_tells_varies() -> None:
    model = Counted().eval()
    fast = attnopt.optimize(model, "fuse", (x(2, 5),), dynamic_shapes="auto")
    assert fast.report.fixed_axes == ("x[2] = 16",)
    assert all(close(model, fast, (x(b, n),)) for b, n in ((2, 5), (3, 8), (7, 4)))
    assert "len" not in globals()


def test_a_batch_that_is_counted_off_stays_fixed() -> None:
    model = CountedForAList().eval()
    fast = attnopt.optimize(model, "fuse", (x(2, 5),), dynamic_shapes="auto")
    assert fast.report.fixed_axes == ("x[0] = 2", "x[2] = 16")
    assert close(model, fast, (x(2, 8),))
    with pytest.raises(CaptureError, match="optimize with"):
        fast(x(3, 5))


def test_len_is_pythons_own_again_and_a_modules_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), lengths_vary(Counted()):
        assert globals()["len"](x(4, 2)) == 4
        assert globals()["len"]("abc") == 3
        with pytest.raises(TypeError, match="0-d"):
            globals()["len"](torch.tensor(1))
        raise KeyError
    assert "len" not in globals()
    monkeypatch.setitem(globals(), "len", own := lambda x: 7)
    with lengths_vary(Counted()):
        assert globals()["len"] is own
    assert globals()["len"] is own


def test_an_example_of_length_1_in_torchs_notation() -> None:
    model = Attend().eval()
    fast = attnopt.optimize(model, "fuse", (x(1, 5),), dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}})
    assert all(close(model, fast, (x(b, n),)) for b, n in ((1, 5), (3, 8)))


def test_a_model_that_tells_one_from_several_keeps_its_axis() -> None:
    class Counts(Attend):
        def forward(self, x: Tensor, **_: Any) -> Any:  # type: ignore[override]
            made = super().forward(x, as_dict=False)[0]
            return made * 2 if x.shape[0] == 1 else made

    for model in (Squeezed().eval(), Counts().eval()):
        assert not longer_axes(model, CallInputs((x(1, 5),), {}), [{0: Dim.AUTO}])
        fast = attnopt.optimize(model, "fuse", (x(1, 5),), dynamic_shapes="auto")
        assert fast.report.fixed_axes == ("x[0] = 1", "x[2] = 16")
        assert all(close(model, fast, (x(1, n),)) for n in (5, 8))
        with pytest.raises(CaptureError, match="optimize with an example of length 3 there"):
            fast(x(3, 5))


def test_the_users_own_example_has_to_fit() -> None:
    """With two heads a mask of one is taken repeated, and then for two alone."""
    given = (x(1, 5), causal(5, 1))
    assert (1, 1) in longer_axes(Attend(2), CallInputs(given, {}), [{}, {1: Dim.AUTO}])
    program = capture(Attend(2).eval(), CallInputs(given, {}), "auto")
    assert "mask[1] = 1" in program.fixed_axes
    assert program.own is not None
    assert program.own[0] is given


def test_own_example_of_one_is_kept_beside_the_second() -> None:
    program = capture(Attend(2).eval(), CallInputs((x(1, 5), causal(5, 1)), {}), "auto")
    assert [pytree.tree_leaves(e)[0].shape[0] for e in program.examples] == [2, 1]
    assert program.module(*program.examples[1][0]) is not None


def test_the_second_example_is_the_first_one_repeated() -> None:
    given = CallInputs((x(1, 5), torch.tensor([[3, 4, 5, 6, 7]])), {})
    places = frozenset({(0, 0), (1, 0)})
    (made, ids), _ = repeated(given, places)
    assert made.shape == (2, 5, 16)
    assert ids.shape == (2, 5)
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[:1], given[0][0])
    assert torch.equal(ids[0], ids[1])
    assert longer_axes(Attend(), CallInputs((x(1, 5),), {}), [{0: Dim.AUTO}]) == {(0, 0)}
    assert longer_axes(Attend(), CallInputs((x(1, 5),), {}), [{1: Dim.AUTO}]) == frozenset()


# ---------------------------------------------------------------- what is said
def test_a_report_is_short() -> None:
    relations = [f"x[1] % {n} != {'1' * n}" for n in range(2, 60)]
    fixed = ("pixel_values[1] = 3", "pixel_values[2] = 32", "pixel_values[3] = 32", "mask[0] = 1", "mask[3] = 7")
    lines = told((*fixed, *relations))
    assert lines[:2] == ("static axes: pixel_values[1-3] = 3 x 32 x 32", "static axes: mask[0, 3] = 1 x 7")
    assert lines[2:] == (*(f"size constraint: {r}" for r in relations[:5]), "53 more size constraints")
    assert told(("y[1] = 2",)) == ("static axis: y[1] = 2",)
    assert max(map(len, told([" + ".join(["x[1]"] * 200) + " == 7"]))) < 200
    assert len(told([f"p{i}[1] = 3" for i in range(100)])) == 11


def test_no_hint_advises_what_was_done() -> None:
    model = Attend().eval()
    with pytest.raises(CaptureError, match='optimize with dynamic_shapes="auto"'):
        attnopt.optimize(model, "fuse", (x(2, 5),))(x(3, 5))
    with pytest.raises(CalibrationError, match='optimize with dynamic_shapes="auto"'):
        attnopt.optimize(model, "fuse", (x(2, 5),), calibration=[x(3, 5)])
    with pytest.raises(CaptureError) as refused:
        attnopt.optimize(Squeezed().eval(), "fuse", (x(1, 5),), dynamic_shapes="auto")(x(3, 5))
    assert "auto" not in str(refused.value)
    with pytest.raises(CalibrationError) as unfit:
        attnopt.optimize(Squeezed().eval(), "fuse", (x(1, 5),), dynamic_shapes="auto", calibration=[x(3, 5)])
    assert "auto" not in str(unfit.value)


def test_inspect_takes_dynamic_shapes() -> None:
    assert attnopt.inspect(Attend(), (x(2, 5),), dynamic_shapes="auto").sites[0].is_dynamic
    assert not attnopt.inspect(Attend(), (x(2, 5),)).sites[0].is_dynamic


def test_narrower_steps_give_fewer_axes() -> None:
    given = (x(2, 5), causal(5, 2))
    free = [{n.name: n.meta["val"].shape for n in capture(Attend(), CallInputs(given, {}), Auto(k)).module.graph.nodes
             if n.op == "placeholder"} for k in (None, 2, 1)]  # fmt: skip
    assert [sum(not is_static(s) for shape in f.values() for s in shape) for f in free] == [5, 2, 2]


# ---------------------------------------------------------------- torch's own fast path, types, modes
def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def test_padding_of_torchs_encoder_is_told() -> None:
    model, given = encoder(), x(2, 6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with pytest.warns(AttnoptWarning, match="skips padded positions, where it writes zeros"):
        fast = attnopt.optimize(model, "fuse", (given,), {"src_key_padding_mask": padding}, dynamic_shapes="auto")
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, theirs = fast(given, src_key_padding_mask=padding), model(given, src_key_padding_mask=padding)
    plain = model(given, src_key_padding_mask=padding)  # with gradients the fast path is not taken
    assert torch.allclose(got, plain, atol=1e-5)
    assert torch.allclose(got[~padding], theirs[~padding], atol=1e-5)
    assert not theirs[padding].any()
    assert got[padding].any()


def test_without_padding_nothing_is_told() -> None:
    model, given = encoder(), x(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = attnopt.optimize(model, "fuse", (given,))
    assert fast.report.warnings == ()


def test_bfloat16_as_a_file_names_the_remedy(tmp_path: Path) -> None:
    model, given = encoder().layers[0].bfloat16(), x(2, 6).bfloat16()
    fast = attnopt.optimize(model, "fuse", (given,))
    with pytest.raises(ExportError, match=r"optimize and export model.float\(\)"):
        fast.export_onnx(tmp_path / "m.onnx")
    attnopt.optimize(model.float(), "fuse", (given.float(),)).export_onnx(tmp_path / "m.onnx")


def test_train_mode_of_a_graph_without_dropout_is_told_once(tmp_path: Path) -> None:
    fast = attnopt.optimize(encoder().layers[0], "fuse", (x(2, 6),))
    fast.save(tmp_path / "saved")
    for module in (fast, attnopt.load(tmp_path / "saved")):
        with pytest.warns(AttnoptWarning, match="captured in eval mode"):
            module.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module.train()
            module.eval()
    plain = attnopt.optimize(Attend().eval(), "fuse", (x(2, 6),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.train().training
        assert not plain.eval().graph_module.training


class KeysAndValuesGiven(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value=value)


def test_keys_and_values_of_an_attention_have_one_length() -> None:
    """torch's fused attention on a CPU takes two lengths, and reads beyond the shorter one: no other sizes may be tried."""
    given = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    free = {0: Dim.AUTO, 2: Dim.AUTO}
    shapes = {"query": free, "key": free, "value": free}
    program = capture(KeysAndValuesGiven(), CallInputs(given, {}), shapes)
    sizes = resized(program.module, program.inputs, program.fixed_axes)
    assert sizes
    assert all(key.shape[2] == value.shape[2] for _, key, value in (made.args for made in sizes))
    fast = attnopt.optimize(KeysAndValuesGiven(), "fuse", given, dynamic_shapes=shapes)
    q, k, v = torch.randn(3, 3, 5, 8), torch.randn(3, 3, 16, 8), torch.randn(3, 3, 18, 8)
    with pytest.raises(CaptureError, match="value"):
        fast(q, k, v)
    torch.testing.assert_close(fast(q, k, v[:, :, :16]), KeysAndValuesGiven()(q, k, v[:, :, :16]))


# ---------------------------------------------------------------- exported programs
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.out(o.transpose(1, 2).flatten(2)) * scale
        return made


def test_axes_of_an_exported_program_have_the_names_of_its_arguments() -> None:
    model, given = Scaled().eval(), (torch.randn(2, 9, 16), torch.ones(1))
    free = torch.export.export(model, given, dynamic_shapes={"tokens": {1: Dim.DYNAMIC}, "scale": None})
    fast = attnopt.optimize(free, "fuse", given, dynamic_shapes={"tokens": {1: Dim.DYNAMIC}})
    longer = torch.randn(2, 23, 16)
    assert torch.allclose(fast(longer, given[1]), model(longer, given[1]), atol=1e-6)
    fixed = torch.export.export(model, given)
    fast = attnopt.optimize(fixed, "fuse", given, dynamic_shapes="auto")
    assert "tokens[1] = 9" in fast.report.fixed_axes
    with pytest.raises(CaptureError, match=r"tokens has length 23 along axis 1(.|\n)*export a program anew"):
        fast(longer, given[1])
