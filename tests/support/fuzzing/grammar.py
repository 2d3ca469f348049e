"""Random cases: which attentions a model has, what surrounds them, and which rewrites are tried on them."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, replace
from typing import Any

from models import Spelling

DECOYS = (
    "SoftmaxGate", "Routing", "DenseRouting", "SoftRouting", "LinearAttention", "KernelAttention", "OverQueries",
    "SlotAttention", "OverChannels", "SlotsOverFeatures", "MaskedAfter", "TalkingHeads", "MappedElsewhere",
    "MappedTwice", "NonLocal", "Sigmoid", "Entmax", "TopK", "Differential",
    "GatedWeights", "CubedScores", "ClassPooling", "SmoothedScores", "Transposed", "Shuffled", "DroppedColumn",
    "FirstColumnDropped", "OneBesideShifted", "PaddedElsewhere", "PaddedTwice",
)  # fmt: skip
REWRITES = (
    "none", "window", "sparse", "prune", "scale", "window+prune", "scale+sparse", "group", "steer", "add", "steer+scale",
    "window+add",
    "segment", "segment+window",
    "pool", "pool+sparse",
    "pad", "prune+pad", "pad+scale",
    "convolve", "convolve+scale", "convolve+prune", "convolve+window",
    "mix", "window+mix", "mix+scale", "prune+mix", "group+mix",
    "rows", "rows+sparse", "window+rows", "prune+rows", "rows+scale",
    "call-steer", "call-scale", "prune+call-scale", "call-mix", "window+call-mix", "patch", "prune+patch", "patch+call-steer",
    "segments", "window+segments", "segments+prune", "call-gain", "swap", "swap+window", "swap-map", "prune+swap-map",
    "extend", "window+extend", "extend+prune",
)  # fmt: skip


CALLED = ("call-steer", "call-scale", "call-mix", "call-gain", "segments", "patch", "swap", "swap-map", "extend")


@dataclass(frozen=True)
class Block:
    """One attention, or one decoy, and the rewrite that is tried on it.

    ``number`` chooses heads, widths and patterns of the rewrite.  ``equal``: groups of K/V heads hold the same weights.
    """

    spelling: Spelling = dataclasses.field(default_factory=Spelling)
    decoy: str = ""
    rewrite: str = "none"
    number: int = 0
    equal: bool = False


@dataclass(frozen=True)
class Case:
    """One model with its inputs and what is checked beside fusing and the blocks' rewrites."""

    blocks: tuple[Block, ...] = (Block(),)
    container: str = "list"  # list, dict, sequential, attributes, wrapped
    reuse: str = ""  # twice (the first attention runs again at the end), tied (its weights are the second one's too)
    branch: str = ""  # shape, training (Python conditions that capture can decide), data (one that it cannot)
    extras: str = "returned"  # returned, used: what becomes of weights, head outputs and statistics
    axes: str = "batched"  # batched, unbatched, folded (one more batch axis)
    dtype: str = "float32"
    batch: int = 2
    length: int = 7
    saved: bool = False
    onnx: bool = False
    dynamic: bool = False
    cached: bool = False  # it continues a text with a cache of keys and values
    seed: int = 0

    @property
    def attentions(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if not b.decoy)

    def repaired(self) -> Case:
        """The nearest case whose parts can stand together."""
        c, width = self, self.blocks[0].spelling.width
        plain = c.axes != "batched" or c.container == "sequential"
        blocks = tuple(replace(b, spelling=_fitting(b.spelling, c, width, plain)) for b in c.blocks)
        blocks = tuple(_editable(b) for b in blocks)
        if c.length < 4:
            blocks = tuple(b for b in blocks if not b.decoy) or (Block(spelling=blocks[0].spelling),)
        if c.reuse and (len(blocks) < 2 or blocks[0].decoy or c.container == "sequential"):
            c = replace(c, reuse="")
        if c.reuse == "tied":
            blocks = (blocks[0], replace(blocks[0], rewrite="none"), *blocks[2:])
        if c.container == "sequential":
            c = replace(c, branch="")
        if any(b.decoy == "TopK" for b in blocks):  # at half precision rounding chooses other keys
            c = replace(c, dtype="float32")
        c = replace(c, blocks=blocks)
        return replace(c, cached=c.cached and _continues(c))


def _continues(c: Case) -> bool:
    """Its tokens may come in parts, each after a cache of those before it."""
    plain = (c.axes, c.reuse, c.dtype) == ("batched", "", "float32") and c.branch in ("", "training")
    alone = {"padding", "float-padding", "given"}
    return (
        plain
        and c.container != "sequential"
        and not any(b.decoy or b.spelling.cross or alone & set(b.spelling.mask) for b in c.blocks)
    )


def _editable(b: Block) -> Block:
    """The oracle hides keys where they meet ``exp``, when a maximum among them has been subtracted: of what is left an epsilon
    may be much, and where nothing is left 0 / 0 must not be cleaned."""
    s = b.spelling
    if not s.exponentials or not {"window", "sparse", "pad"} & set(b.rewrite.split("+")):
        return b
    softmax = "stable-exp" if s.softmax == "eps" else s.softmax
    return replace(b, spelling=replace(s, softmax=softmax, after="" if s.after == "clean" else s.after))


def _fitting(s: Spelling, c: Case, width: int, plain: bool) -> Spelling:
    s = replace(s, width=width, windows=s.windows and c.axes == "folded")
    if plain:  # inputs that only a batched model, or one with a forward of its own, is given
        s = replace(s, cross=False, mask=tuple(m for m in s.mask if m in ("causal", "window", "left", "far", "chunk")))
    if c.container == "sequential":
        s = replace(s, returns="output")
    if c.dtype == "float16" and s.apply == "moderate":  # nothing that can be added hides every score
        s = replace(s, apply="masked_fill")
    if c.dtype != "float32":  # exponentials of scores as they are leave the range of float16
        unsafe = {"exp": "stable-exp", "late": "later"} if c.dtype == "float16" else {}
        s = replace(s, softmax=unsafe.get(s.softmax, s.softmax))
    return s.repaired()


def draw(seed: int, number: int) -> Case:
    """The case with this number: the same at every run."""
    r = random.Random(f"{seed}:{number}")
    count = r.choices((1, 2, 3), (5, 4, 2))[0]
    blocks = [_block(r) for _ in range(count)]
    if r.random() < 0.25:
        blocks.insert(r.randrange(len(blocks) + 1), Block(Spelling(), decoy=r.choice(DECOYS)))
    other = random.Random(f"{seed}:{number}:other")  # the cases of before stay what they were
    if other.random() < 0.1:
        blocks.insert(
            other.randrange(len(blocks) + 1), Block(Spelling(), decoy="AnyLinear", number=other.randrange(10_000))
        )
    blocks = [_with_rows(b) if other.random() < 0.05 else b for b in blocks]
    dtype = r.choices(("float32", "bfloat16", "float16"), (8, 1, 1))[0]
    return Case(
        blocks=tuple(blocks),
        container=r.choice(("list", "dict", "sequential", "attributes", "wrapped")),
        reuse=r.choices(("", "twice", "tied"), (8, 1, 1))[0],
        branch=r.choices(("", "shape", "training", "data"), (80, 10, 9, 1))[0],
        extras=r.choice(("returned", "used")),
        axes=r.choices(("batched", "unbatched", "folded"), (14, 2, 3))[0],
        dtype=dtype,
        batch=r.choice((1, 2, 2, 3)),
        length=r.choices((7, 4, 9, 2, 1), (60, 15, 15, 9, 1))[0],
        saved=r.random() < 0.05,
        onnx=dtype == "float32" and r.random() < (0.05 if any(map(_is_called, blocks)) else 0.01),
        dynamic=r.random()
        < (0.3 if any(_is_called(b) or {"far", "chunk"} & set(b.spelling.mask) for b in blocks) else 0.04),
        cached=r.random() < 0.1,
        seed=r.randrange(1000),
    ).repaired()


def _with_rows(b: Block) -> Block:
    """Rows of a table meet the queries; what reads queries by themselves is left to other cases."""
    if b.decoy:
        return b
    kept = set(b.rewrite.split("+")) <= {"window", "sparse", "prune", "scale", "group"}
    return replace(b, spelling=replace(b.spelling, bias_kind="rows"), rewrite=b.rewrite if kept else "window+prune")


def _is_called(b: Block) -> bool:
    return bool(set(b.rewrite.split("+")) & set(CALLED))


def _block(r: random.Random) -> Block:
    return Block(_spelling(r), rewrite=r.choice(REWRITES), number=r.randrange(24), equal=r.random() < 0.5)


def _spelling(r: random.Random) -> Spelling:
    heads, kv_heads = r.choice(((4, 4), (4, 4), (6, 6), (4, 2), (6, 3), (6, 2), (4, 1), (3, 3), (1, 1), (2, 2)))
    masks = ("causal", "window", "left", "far", "chunk", "padding", "float-padding", "given")
    return Spelling(
        heads=heads, kv_heads=kv_heads, width=r.choice((12, 15, 7)), head_dim=r.choice((4, 4, 5, 6, 3, 8)),
        value_dim=r.choice((4, 3, 5)), bias=r.random() < 0.5,
        op=r.choice(("linear", "linear", "parameter", "addmm", "conv1d", "conv2d", "einsum")),
        packing=r.choice(("separate", "fused", "kv", "per-head", "per-group")), order=r.choice(("qkv", "qvk", "kqv", "vqk")),
        unpack=r.choice(("chunk", "split", "slice", "unbind", "select", "index")),
        core=r.choice(("matmul", "bmm", "baddbmm", "einsum", "heads-last", "channels", "transposed", "mulsum", "sdpa",
                       "grouped", "grouped-einsum")),
        share=r.choice(("repeat_interleave", "expand", "tiled", "index", "enable_gqa", "broadcast")),
        rope=r.choice(("", "", "half", "chunks", "interleaved", "in-place", "complex")),
        norm=r.choice(("", "", "", "layer", "rms", "l2", "across")),
        scale=r.choice(("q", "k", "both", "mul", "div", "alpha", "none", "buffer", "temperature", "over", "root")),
        mask=tuple(r.sample(masks, r.choice((0, 1, 1, 2)))), made=r.choice(("tril", "triu", "arange", "like")),
        apply=r.choice(("add-inf", "add-min", "lerp", "where", "masked_fill", "moderate", "assigned", "old-gpt")),
        after=r.choice(("", "", "", "again", "flags", "rows", "clean")), commuted=r.random() < 0.5,
        bias_kind=r.choice(("", "", "", "alibi", "table", "addend")), softcap=r.choice((*[None] * 6, 5.0, 1.0)),
        sinks=r.random() < 0.25, sink=r.choice(("learned", "learned", "padded", "one")),
        softmax=r.choice(("F", "torch", "method", "positive", "float32", "upcast", "shifted", "exp", "stable-exp", "inverse",
                          "exp2", "eps", "log", "lse", "lse-rows", "again", "late", "later")),
        cross=r.random() < 0.2, returns=r.choices(("output", "weights", "heads", "stats"), (8, 1, 1, 1))[0],
        out=r.random() < 0.93, pre_norm=r.random() < 0.5, residual=r.random() < 0.5, dropout=r.random() < 0.5,
        windows=r.random() < 0.5,
    ).repaired()  # fmt: skip


# ---------------------------------------------------------------- as JSON
def to_json(case: Case) -> dict[str, Any]:
    """Only what differs from the defaults."""
    return _differing(case, Case())


def _differing(value: Any, plain: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        if isinstance(own, Spelling):
            found[f.name] = _differing(own, Spelling())
        elif f.name == "blocks":
            found[f.name] = [_differing(b, Block()) for b in own]
        elif own != getattr(plain, f.name):
            found[f.name] = list(own) if isinstance(own, tuple) else own
    return found


def from_json(data: dict[str, Any]) -> Case:
    def block(b: dict[str, Any]) -> Block:
        s = {k: tuple(v) if k == "mask" else v for k, v in b.get("spelling", {}).items()}
        return Block(**{**b, "spelling": Spelling(**s)})

    return Case(**{**data, "blocks": tuple(block(b) for b in data["blocks"])})
