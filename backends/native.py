"""Builds ``attend.cpp`` for this machine on first use, caches the library in the user's cache folder, and calls it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.atomic_files import cache_folder
from attnopt.base.processor import instructions
from attnopt.ir.operands import BLOCK, OperandTensors, SegmentTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.block_layout import FULL_TILE, Layout
from attnopt.patterns.query_order import order_of, ordered_layout

_SOURCE = Path(__file__).with_name("attend.cpp")
_HEADERS = tuple(_SOURCE.with_name(f"attend_{name}.h") for name in ("pairs", "products", "vectors"))
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# The least share of the pairs in visited blocks that must be seen for half precision to gain: it gains nothing by keys that
# lie apart.  Measured with tiles.
_DENSE = {torch.bfloat16: 0.4, torch.float16: 0.75}
_SECONDS = 300  # more than any compiler needs, so a stuck one does not hang the program


class NoKernelError(Exception):
    """Why there is no compiled kernel on this machine."""


class Form(IntEnum):
    """How the kernel multiplies half precision: converted to float32, by instructions that add two products of bfloat16 to
    a float32, or by those of Intel AMX on tiles.  What can do one of these can do those before it, too."""

    FLOAT32 = 0
    PAIRS = 1
    TILES = 2


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of attend.cpp; neighbours of one type are one array here."""

    _fields_ = [
        ("operands", ctypes.c_void_p * 14),
        ("sizes", ctypes.c_int64 * 6),
        ("strides", ctypes.c_int64 * 52),
        ("table", ctypes.c_void_p * 7),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("is_float16", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class _Table:
    """What the kernel reads of a spec at given lengths: addresses, and the arrays that they point to."""

    addresses: ctypes.Array[ctypes.c_void_p]
    arrays: tuple[NDArray[np.generic], ...]
    seen: float  # the share of the pairs in visited blocks that the pattern shows


def attend(spec: AttentionSpec, t: OperandTensors, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``spec`` without its edits on CPU: the output in v's dtype, and the log-sum-exp of each row as in ``AttendWithLse``.
    ``order``, [B|1, L]: neighbours in it share blocks.

    Computed in float32, or in half precision as ``form_of`` says: probabilities are rounded to bfloat16 where they meet
    values of bfloat16, sums are in float32.

    The output has the strides of [B, L, H, Dv], so merging the heads copies nothing.  Raises NoKernelError.
    """
    kernel = library()
    B, H, L, D = t.q.shape
    S, Dv = t.k.shape[2], t.v.shape[3]
    table = _table(spec, L, S, t.selected is None)
    form = form_of(t.v.dtype, table.seen) if t.q.dtype == t.k.dtype == t.v.dtype else Form.FLOAT32
    dtype = torch.float32 if form is Form.FLOAT32 else t.v.dtype
    out = t.q.new_empty(B, L, H, Dv, dtype=dtype).transpose(1, 2)
    top, log_sum = (t.q.new_empty(B, H, L, 1, dtype=torch.float32) for _ in range(2))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (t.q.to(dtype), t.k.to(dtype), t.v.to(dtype)))
    bias, sinks = (None if x is None else x.float() for x in (t.bias, t.sinks))
    if bias is not None and bias.shape[2] != 1 and bias.shape[3] != 1 and bias.stride(3) != 1:
        bias = bias.contiguous()  # the kernel needs contiguous rows
    q_segments, kv_segments, pairs = _segments(t.segments)
    order = None if order is None else order.to(torch.int32)
    operands = (q, k, v, bias, sinks, t.mask, t.selected, q_segments, kv_segments, pairs, order, out, top, log_sum)
    arguments = _Arguments(
        tuple(None if x is None else x.data_ptr() for x in operands),
        (B, H, L, S, D, Dv),
        tuple(step for x in (*operands[:7], *map(_of_four_axes, operands[7:11]), out, top) for step in _strides(x)),
        table.addresses,
        spec.scale,
        spec.softcap or 0.0,
        torch.get_num_threads(),
        form,
        dtype == torch.float16,
    )
    kernel.attnopt_attend(ctypes.byref(arguments))
    return out.to(t.v.dtype), top.squeeze(3), log_sum.squeeze(3)


def _segments(given: SegmentTensors | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if given is None:
        return None, None, None
    own = given.numbered()
    pairs = None if own.pairs is None else own.pairs.contiguous()
    queries, keys = _narrow(own.queries, own.keys)
    return queries.contiguous(), keys.contiguous(), pairs


def _narrow(*ids: Tensor) -> tuple[Tensor, ...]:
    """The same segments in the same order, numbered anew if an id needs more than 32 bits; -1 for none."""
    ids = tuple(x.long().clamp(min=-1) for x in ids)
    if any(bool((x > torch.iinfo(torch.int32).max).any()) for x in ids):
        known = torch.cat([x.flatten() for x in ids]).sort().values
        none = int((known < 0).sum())
        ids = tuple(torch.searchsorted(known, x) - none for x in ids)
    return tuple(x.to(torch.int32) for x in ids)


def _of_four_axes(t: Tensor | None) -> Tensor | None:
    """Numbers of tokens as [B, 1, length, 1], and pairs as [1, H, R, R]."""
    if t is None:
        return None
    return t.unsqueeze(0) if t.dim() == 3 else t[:, None, :, None]


def _strides(t: Tensor | None) -> tuple[int, ...]:
    """0 for a broadcast axis."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True))


@lru_cache(maxsize=64)
def _table(spec: AttentionSpec, q_len: int, kv_len: int, ordered: bool) -> _Table:
    pattern = spec.pattern
    of_head = [pattern.for_head(h) if pattern.is_per_head else pattern for h in range(spec.num_heads)]
    distinct = list(dict.fromkeys(of_head))
    orders = [order_of(p, q_len) if ordered else None for p in distinct]
    layouts = [
        ordered_layout(p, q_len, kv_len, BLOCK, BLOCK) if ordered else p.layout(q_len, kv_len, BLOCK, BLOCK)
        for p in distinct
    ]
    entries = np.cumsum([0, *(len(x.cols) for x in layouts)])[:-1]
    shapes = np.cumsum([0, *(len(x.tiles) for x in layouts)])[:-1]
    numbered = [
        np.where(x.tile == FULL_TILE, FULL_TILE, x.tile + first) for x, first in zip(layouts, shapes, strict=True)
    ]
    arrays = (
        np.asarray(spec.kv_of_head, np.int32),
        np.asarray([distinct.index(p) for p in of_head], np.int32),
        np.concatenate([x.row_ptr + first for x, first in zip(layouts, entries, strict=True)]).astype(np.int64),
        np.concatenate([x.cols for x in layouts]).astype(np.int32),
        np.concatenate(numbered).astype(np.int32),
        np.concatenate([_bits(x.tiles) for x in layouts]),
        np.concatenate([np.arange(q_len) if order is None else order for order in orders]).astype(np.int32),
    )
    seen, visited = np.sum([_pairs(x, q_len, kv_len) for x in layouts], axis=0)
    return _Table((ctypes.c_void_p * 7)(*(a.ctypes.data for a in arrays)), arrays, float(seen / max(visited, 1)))


def _pairs(layout: Layout, q_len: int, kv_len: int) -> tuple[int, int]:
    """The pairs that are seen, and those of the blocks that are visited."""
    queries, keys = (np.minimum(BLOCK, n - BLOCK * at) for n, at in ((q_len, layout.rows), (kv_len, layout.cols)))
    visited = queries * keys
    of_tile = np.append(layout.tiles.sum((1, 2)), 0)
    return int(np.where(layout.tile == FULL_TILE, visited, of_tile[layout.tile]).sum()), int(visited.sum())


def _bits(tiles: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """[T, queries, keys] as [T, keys] words: bit r is query r."""
    packed = np.packbits(tiles.transpose(0, 2, 1), axis=2, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").reshape(-1, BLOCK)


def form_of(dtype: torch.dtype, seen: float = 1.0) -> Form:
    """The fastest form in which this process can compute ``dtype``, or the one that ATTNOPT_HALF names.  ``seen``: the
    share of the pairs in visited blocks that are seen.

    float16 is computed as the sum of two bfloat16, which only tiles make worth while.  Raises ValueError, NoKernelError.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return Form.FLOAT32
    form = Form(library().attnopt_own_form()) if seen >= _DENSE[dtype] else Form.FLOAT32
    if wanted := os.environ.get("ATTNOPT_HALF"):
        offered = [form.name.lower() for form in Form if form <= library().attnopt_best_form()]
        if wanted.lower() not in offered:
            raise ValueError(f"ATTNOPT_HALF is {wanted!r}; this CPU, compiler and system offer {', '.join(offered)}")
        form = Form[wanted.upper()]
    return Form.FLOAT32 if dtype == torch.float16 and form is Form.PAIRS else form


def why_not() -> str | None:
    """Why there is no kernel here, or None if there is one."""
    try:
        library()
    except NoKernelError as e:
        return str(e)
    return None


def compiler() -> str | None:
    """That which the environment variable CXX names, or the first that is installed."""
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)


def version() -> str:
    """What tells this kernel from those of other sources, compilers and processors; empty if there is none."""
    return "" if why_not() else Path(library()._name).stem


def library() -> ctypes.CDLL:
    """The compiled kernel.  Raises NoKernelError, at once if it failed before."""
    found = _built()
    if isinstance(found, str):
        raise NoKernelError(found)
    return found


@lru_cache(maxsize=1)
def _built() -> ctypes.CDLL | str:
    with_it = compiler()
    if with_it is None:
        return "there is no C++ compiler (g++, clang++, or the one that CXX names)"
    try:
        return ctypes.CDLL(str(_compiled(with_it)))
    except subprocess.CalledProcessError as e:
        return f"{with_it} failed: {_what_failed(e.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{with_it}: {e}"


def _what_failed(told: str) -> str:
    """The first error of a compiler, whose notes follow."""
    lines = told.strip().splitlines()
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "it does not say why")


def _compiled(with_it: str) -> Path:
    told = subprocess.run([with_it, "--version"], capture_output=True, text=True, check=True).stdout
    sources = (file.read_text() for file in (_SOURCE, *_HEADERS))
    mark = hashlib.sha256("\0".join((*sources, told, *_FLAGS, instructions())).encode()).hexdigest()[:24]
    path = cache_folder() / f"attend-{mark}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [with_it, *_FLAGS, str(_SOURCE), "-o", str(made)]
        for threads in (["-fopenmp"], []):  # a compiler may lack OpenMP: then one thread does the work
            done = subprocess.run([*command, *threads], capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, path)
    return path
