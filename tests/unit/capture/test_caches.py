"""Models that take or return caches: they come back as the model's own objects, and the caller's are updated in place."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import Buffers, Counting, Decoder, Lists
from torch import Tensor, nn

import attnopt
from attnopt.archive.folder import digest
from attnopt.base.atomic_files import MARKER
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import difference, tensors
from attnopt.base.containers import copied
from attnopt.capture.capture import capture
from attnopt.capture.dynamic_axes import Auto
from attnopt.errors import ArchiveError, CaptureError

pytestmark = pytest.mark.usefixtures("one_torchlib")

KINDS = (Lists, Counting, Buffers)


def tokens(length: int, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def filled(model: nn.Module, cache: Any, length: int = 5) -> Any:
    with torch.no_grad():
        model(tokens(length), cache=cache)
    return cache


def decode(model: Decoder, step: Any, cache: Any, prompt: int = 4, count: int = 7) -> Tensor:
    """Logits of the tokens after a prompt, which ``model`` reads and ``step`` continues greedily."""
    made = []
    with torch.no_grad():
        logits, back = model(tokens(prompt, seed=1), cache=cache)
        for _ in range(count):
            logits, back = step(logits[:, -1:].argmax(-1), cache=back)
            assert back is cache
            made.append(logits)
    return torch.cat(made, 1)


def close(got: Any, want: Any) -> None:
    assert difference([t.detach() for t in tensors(got)], [t.detach() for t in tensors(want)]) < 1e-5


def plain(x: Any) -> Any:
    """An object with the shapes of its tensors in their places."""
    if isinstance(x, Tensor):
        return tuple(x.shape)
    if hasattr(x, "__dict__"):
        slots = {"pos": x.pos} if isinstance(x, Buffers) else {}
        return type(x), {k: plain(v) for k, v in {**vars(x), **slots}.items()}
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [type(x), *map(plain, x)] if isinstance(x, (list, tuple)) or hasattr(x, "maxlen") else x


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one(kind: type[Lists], length: int) -> None:
    model = Decoder(kind).eval()
    example = filled(model, kind())
    before = copied(example)
    step = attnopt.optimize(model, "fuse", (tokens(length),), {"cache": example}, dynamic_shapes="auto")
    assert difference(tensors(example), tensors(before)) == 0, "the example is the user's"
    assert plain(example) == plain(before)
    assert [s.status for s in step.report.sites] == ["rewritten"] * 2
    ours, theirs = kind(), kind()
    close(decode(model, step, ours), decode(model, model, theirs))
    close(ours, theirs)
    assert plain(ours) == plain(theirs)


@pytest.mark.parametrize("kind", [Lists, Counting])
def test_a_cache_that_the_model_makes(kind: type[Lists]) -> None:
    model = Decoder(kind).eval()
    fast = attnopt.optimize(model, "fuse", (tokens(6),), dynamic_shapes="auto")
    for length in (6, 9, 2):
        (logits, cache), (wanted, theirs) = fast(tokens(length)), model(tokens(length))
        close((logits, cache), (wanted, theirs))
        assert type(cache) is kind
        assert plain(cache) == plain(theirs)
        close(model(tokens(1), cache=cache)[0], model(tokens(1), cache=theirs)[0])


def test_an_empty_cache_that_is_passed_in() -> None:
    model, ours, theirs = Decoder().eval(), Lists(), Lists()
    fast = attnopt.optimize(model, "fuse", (tokens(6),), {"cache": Lists()}, dynamic_shapes="auto")
    close(fast(tokens(8), cache=ours), model(tokens(8), cache=theirs))
    assert plain(ours) == plain(theirs)
    with pytest.raises(
        CaptureError, match=r"cache\.k\[0\] is Tensor, captured with None\n  hint: optimize the model once more with an"
    ):
        fast(tokens(8), cache=ours)


def test_what_the_caller_holds_of_a_buffer_is_updated() -> None:
    model = Decoder(Buffers).eval()
    step = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, Buffers())}, dynamic_shapes="auto")
    cache = filled(model, Buffers())
    held, wanted = cache.kv, filled(model, Buffers())
    with torch.no_grad():
        step(tokens(1), cache=cache)
        model(tokens(1), cache=wanted)
    assert cache.kv is held
    close(held, wanted.kv)


def test_a_list_that_the_model_changes() -> None:
    class Model(Decoder):
        def forward(self, ids: Tensor, past: list[Tensor | None]) -> Tensor:  # type: ignore[override]
            cache = Lists()
            cache.k, cache.v = list(past[:2]), list(past[2:])
            logits, _ = super().forward(ids, cache)
            past[:] = [*cache.k, *cache.v]
            return logits

    def past(length: int) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * 4
        with torch.no_grad():
            model(tokens(length), found)
        return found

    model = Model().eval()
    step = attnopt.optimize(model, "fuse", (tokens(1), past(5)), dynamic_shapes="auto")
    ours, theirs = past(8), past(8)
    held = ours
    close(step(tokens(1), ours), model(tokens(1), theirs))
    close(ours, theirs)
    assert ours is held
    assert ours[0] is not None
    assert ours[0].shape[2] == 9


def test_other_structures_are_refused() -> None:
    model = Decoder(Counting).eval()
    step = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, Counting())}, dynamic_shapes="auto")
    cache = filled(model, Counting())
    cache.label = "mine"
    with pytest.raises(CaptureError, match="cache has 4 attributes, captured with 3; only one of them has label"):
        step(tokens(1), cache=cache)
    cache = filled(model, Counting())
    del cache.pairs[1]
    with pytest.raises(CaptureError, match=r"cache\.pairs has 1 items, captured with 2; only one of them has 1"):
        step(tokens(1), cache=cache)
    with pytest.raises(CaptureError, match="cache is Lists, captured with Counting"):
        step(tokens(1), cache=filled(model, Lists()))
    with pytest.raises(CaptureError, match="cache is NoneType"):
        step(tokens(1))
    cache = filled(model, Counting())
    before = plain(cache)
    with pytest.raises(CaptureError, match="dtype"):
        step(tokens(1).int(), cache=cache)
    assert plain(cache) == before, "nothing is half done"


def test_a_model_without_a_cache_refuses_one() -> None:
    model = Decoder().eval()
    fast = attnopt.optimize(model, "fuse", (tokens(6), None), dynamic_shapes="auto")
    with pytest.raises(CaptureError, match="cache is Lists, "):
        fast(tokens(6), filled(model, Lists()))


class Settings(nn.Module):
    """A cache with a fixed number in it, which the model reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self.inner(ids, cache)[0]
        return logits * cache.factor


def test_a_number_that_a_call_does_not_change_is_fixed() -> None:
    model = Settings().eval()

    def cache(factor: float) -> Lists:
        made = Lists()
        made.factor = factor  # type: ignore[attr-defined]
        return filled(model, made)

    step = attnopt.optimize(model, "fuse", (tokens(1), cache(2.0)), dynamic_shapes="auto")
    close(step(tokens(1), cache(2.0)), model(tokens(1), cache(2.0)))
    with pytest.raises(CaptureError, match=r"cache\.factor is 3\.0, captured with 2\.0"):
        step(tokens(1), cache(3.0))


class TwoCaches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder(Buffers)

    def forward(self, ids: Tensor, cache: Any, other: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids, cache)[0]
        return logits + other.mean()


def test_memory_that_two_tensors_share_is_refused() -> None:
    model, cache = TwoCaches().eval(), Buffers()
    filled(model.inner, cache)
    step = attnopt.optimize(model, "fuse", (tokens(1), copied(cache), torch.zeros(4)), dynamic_shapes="auto")
    step(tokens(1), copied(cache), torch.zeros(4))
    with pytest.raises(CaptureError, match=r"cache\.kv is written to, but shares memory with other"):
        step(tokens(1), cache, cache.kv.flatten()[:4])


class Wrapped:
    def __init__(self, cache: Any, notes: list[Any]) -> None:
        self.cache, self.notes, self.owner = cache, notes, self


class Wraps(nn.Module):
    """Returns a new object that refers to the one that was passed in, to an input and to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, ids: Tensor, cache: Any) -> dict[str, Any]:
        logits, cache = self.inner(ids, cache)
        return {"logits": logits, "made": Wrapped(cache, [ids, logits, "two"])}


def test_new_objects_refer_to_the_callers_own() -> None:
    model = Wraps().eval()
    step = attnopt.optimize(model, "fuse", (tokens(1), filled(model, Lists())), dynamic_shapes="auto")
    ids, cache = tokens(1, seed=3), filled(model, Lists(), 8)
    out = step(ids, cache)
    made = out["made"]
    assert type(made) is Wrapped
    assert made.cache is cache
    assert made.owner is made
    assert made.notes[0] is ids
    assert made.notes[1] is out["logits"]
    assert made.notes[2] == "two"
    close(out, model(ids, filled(model, Lists(), 8)))


def test_inspection_and_capture_leave_the_callers_cache() -> None:
    model = Decoder().eval()
    cache = filled(model, Lists())
    before = plain(cache)
    assert len(attnopt.inspect(model, (tokens(1),), {"cache": cache}).sites) == 2
    assert plain(cache) == before


def test_names_and_lines_are_the_models_own() -> None:
    model = Decoder().eval()
    with_cache = attnopt.inspect(model, (tokens(1),), {"cache": filled(model, Lists())})
    assert [s.name for s in with_cache.sites] == ["layers.0", "layers.1"]
    assert all(s.where.startswith("caches.py:") for s in with_cache.sites)
    assert with_cache.sites[0].projections["q"].weight == "layers.0.q.weight"


def test_calibration_batches_hold_caches() -> None:
    model = Decoder().eval()
    batches = [{"ids": tokens(2, seed=i), "cache": filled(model, Lists(), 5 + i)} for i in range(3)]
    made = attnopt.optimize(
        model, "fuse", (tokens(2),), {"cache": filled(model, Lists())}, dynamic_shapes="auto", calibration=batches
    )
    assert made.report.error is not None
    assert made.report.error < 1e-5
    assert batches[0]["cache"].k[0].shape[2] == 5, "batches are the user's"


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_for_all_tensors_of_a_cache(kind: type[Lists]) -> None:
    model = Decoder(kind).eval()
    free = torch.export.Dim.AUTO
    axes = {2: free} if kind is Buffers else {0: free, 2: free}
    shapes = {"ids": {0: free}, "cache": axes}
    step = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, kind())}, dynamic_shapes=shapes)
    ours, theirs = kind(), kind()
    close(decode(model, step, ours), decode(model, model, theirs))
    fixed = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, kind())})
    close(fixed(tokens(1), cache=filled(model, kind())), model(tokens(1), cache=filled(model, kind())))
    with pytest.raises(CaptureError):
        fixed(tokens(1), cache=filled(model, kind(), 7))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: type[Lists], tmp_path: Path) -> None:
    model = Decoder(kind).eval()
    step = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, kind())}, dynamic_shapes="auto")
    step.save(tmp_path / "step")
    again = attnopt.load(tmp_path / "step")
    ours, theirs = kind(), kind()
    assert torch.equal(decode(model, again, ours), decode(model, step, theirs))
    assert plain(ours) == plain(theirs)


@pytest.mark.slow
def test_a_class_that_a_file_names_is_not_made(tmp_path: Path) -> None:
    model = Decoder().eval()
    prompt = attnopt.optimize(model, "fuse", (tokens(5),), dynamic_shapes="auto")
    prompt.save(tmp_path / "prompt")
    with pytest.raises(
        ArchiveError, match=r"returns a caches:Lists.*\n  hint: pass the class: attnopt.load\(path, classes="
    ):
        attnopt.load(tmp_path / "prompt")
    again = attnopt.load(tmp_path / "prompt", classes=[Lists])
    close(again(tokens(7)), model(tokens(7)))
    assert type(again(tokens(7))[1]) is Lists
    for name in ("subprocess:Popen", "tempfile:TemporaryDirectory", "transformers.trainer:Trainer", "builtins:object"):
        about = json.loads((tmp_path / "prompt" / MARKER).read_text())
        about["form"]["results"]["nodes"][0]["kind"] = name
        del about["self_sha256"]
        about["self_sha256"] = digest(about)
        (tmp_path / "prompt" / MARKER).write_text(json.dumps(about))
        with pytest.raises(ArchiveError, match="does not instantiate classes"):
            attnopt.load(tmp_path / "prompt", classes=[Lists])


@pytest.mark.parametrize("attribute", ["__class__", "__dict__", "a b"])
def test_an_attribute_that_no_file_may_set(attribute: str, tmp_path: Path) -> None:
    attnopt.optimize(Decoder().eval(), "fuse", (tokens(5),)).save(tmp_path / "m")
    about = json.loads((tmp_path / "m" / MARKER).read_text())
    about["form"]["results"]["nodes"][0]["attributes"][0][0] = attribute
    del about["self_sha256"]
    about["self_sha256"] = digest(about)
    (tmp_path / "m" / MARKER).write_text(json.dumps(about))
    with pytest.raises(ArchiveError, match="a file may not set the attribute"):
        attnopt.load(tmp_path / "m", classes=[Lists])


class Strange(Decoder):
    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        x, made = super().forward(ids, cache)
        made.helper = print
        return x, made


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    made = attnopt.optimize(Strange().eval(), "fuse", (tokens(5),))
    assert made(tokens(5))[1].helper is print
    with pytest.raises(ArchiveError, match=r"caches:Lists\.helper is a builtin_function_or_method"):
        made.save(tmp_path / "m")


def test_a_copy_and_a_pickle_work_alike() -> None:
    model = Decoder().eval()
    step = attnopt.optimize(model, "fuse", (tokens(1),), {"cache": filled(model, Lists())}, dynamic_shapes="auto")
    for again in (copy.deepcopy(step), pickle.loads(pickle.dumps(step.origin.form)) and step):
        close(again(tokens(1), cache=filled(model, Lists(), 7)), model(tokens(1), cache=filled(model, Lists(), 7)))


def run(file: Path, feed: dict[str, Any]) -> dict[str, Any]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    assert names == set(feed)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feed), strict=True))


@pytest.mark.slow
def test_a_file_goes_on_from_its_own_outputs(tmp_path: Path) -> None:
    """A cache with a counter, token by token in ONNX Runtime: what goes out under ``present`` comes in again."""
    pytest.importorskip("onnx")
    model = Decoder(Counting).eval()
    cache = filled(model, Counting())
    step = attnopt.optimize(model, "fuse", (tokens(2),), {"cache": cache}, dynamic_shapes="auto")
    step.export_onnx(tmp_path / "step.onnx")
    wanted, feed = copied(cache), {
        "cache.step": np.asarray(cache.step),
        **{f"cache.pairs.{i}.{j}": cache.pairs[i][j].numpy() for i in range(2) for j in range(2)},
        **{f"cache.recent.{i}": cache.recent[i].numpy() for i in range(2)},
    }  # fmt: skip
    del feed["cache.recent.0"], feed["cache.recent.1"]  # which nothing reads
    for i in range(4):
        ids = tokens(2, seed=i)
        out = run(tmp_path / "step.onnx", {"ids": ids.numpy(), **feed})
        with torch.no_grad():
            logits, _ = model(ids, cache=wanted)
        assert difference([torch.from_numpy(out["output_0"])], [logits]) < 1e-4
        feed = {name: out[name.replace("cache", "present", 1)] for name in feed}
        assert int(feed["cache.step"]) == wanted.step


def tiny(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, "num_key_value_heads": 2, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        p.data *= 2
    return model


def read(model: Any, cache: Any, length: int = 7) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens(length), past_key_values=cache)


@pytest.mark.slow
def test_an_output_with_its_cache(tmp_path: Path) -> None:
    model = tiny("Llama")
    fast = attnopt.optimize(model, "fuse", (), {"input_ids": tokens(6)}, dynamic_shapes="auto")
    got, wanted = fast(input_ids=tokens(11)), model(input_ids=tokens(11))
    assert type(got) is type(wanted)
    assert type(got.past_key_values) is type(wanted.past_key_values)
    close(got, wanted)
    assert len(tensors(got)) == 5
    close(
        model(input_ids=tokens(1), past_key_values=got.past_key_values),
        model(input_ids=tokens(1), past_key_values=wanted.past_key_values),
    )
    fast.save(tmp_path / "m")
    again = attnopt.load(tmp_path / "m")(input_ids=tokens(9))
    assert plain(again.past_key_values) == plain(model(input_ids=tokens(9)).past_key_values)
    with pytest.raises(CaptureError, match="called with past_key_values"):
        fast(input_ids=tokens(1), past_key_values=got.past_key_values)


@pytest.mark.parametrize("name", ["dynamic", "static", "sliding", "hybrid"])
def test_caches_of_transformers(name: str) -> None:
    """One token after another; a window that is full goes on with what was captured when it was full."""
    transformers = pytest.importorskip("transformers")
    if name == "hybrid":
        model = tiny("Lfm2", layer_types=["conv", "full_attention"])
    else:
        model = tiny("Mistral", sliding_window=6 if name == "sliding" else None)

    def empty() -> Any:
        if name == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=24)
        return transformers.DynamicCache(config=model.config)

    example = empty()
    read(model, example)
    step = attnopt.optimize(
        model, "fuse", (), {"input_ids": tokens(1), "past_key_values": example}, dynamic_shapes="auto"
    )
    ours, theirs = empty(), empty()
    read(model, ours, 9)
    read(model, theirs, 9)
    for i in range(4):
        with torch.no_grad():
            got = step(input_ids=tokens(1, seed=i), past_key_values=ours)
            wanted = model(input_ids=tokens(1, seed=i), past_key_values=theirs)
        assert got.past_key_values is ours
        close(got, wanted)
        assert plain(ours) == plain(theirs)
    if name == "sliding":
        short = empty()
        read(model, short, 3)
        with pytest.raises(CaptureError, match="hint: optimize the model once more with an example of this structure"):
            step(input_ids=tokens(1), past_key_values=short)


@pytest.mark.slow
def test_names_in_files(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    model = tiny("Llama")
    cache = transformers.DynamicCache(config=model.config)
    read(model, cache)
    inputs = {"input_ids": tokens(1), "past_key_values": cache}
    attnopt.optimize(model, "fuse", (), inputs, dynamic_shapes="auto").export_onnx(tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    layers = [f"{i}.{what}" for i in range(2) for what in ("key", "value")]
    assert [i.name for i in session.get_inputs()] == ["input_ids", *(f"past_key_values.{n}" for n in layers)]
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{n}" for n in layers)]


@pytest.mark.slow
def test_names_of_an_encoder_decoder(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    model = transformers.T5ForConditionalGeneration(config).eval()
    encoded = model.encoder(input_ids=tokens(6))
    own = model(encoder_outputs=encoded, decoder_input_ids=tokens(3)).past_key_values
    inputs = {"encoder_outputs": encoded, "decoder_input_ids": tokens(1), "past_key_values": own}
    step = attnopt.optimize(model, "fuse", (), inputs, dynamic_shapes="auto")
    wanted = copied(own)
    close(step(**inputs), model(**{**inputs, "past_key_values": wanted}))
    close(own, wanted)
    step.export_onnx(tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    assert {o.name for o in session.get_outputs()} >= {"logits", "present.0.decoder.key", "present.0.decoder.value"}
    assert {i.name for i in session.get_inputs()} >= {
        "past_key_values.0.decoder.key",
        "past_key_values.0.encoder.value",
    }


def test_axes_that_stay_static_beside_a_cache_are_told() -> None:
    model = Decoder(Lists).eval()
    inputs = CallInputs((tokens(3),), {"cache": filled(model, Lists())})
    program = capture(model, inputs, Auto(1))
    assert "ids[1] = 3" in program.fixed_axes
    assert not any(line.startswith("ids[0]") for line in program.fixed_axes)
