"""Builds ``attend.cpp`` for this machine on first use, keeps the library in the user's cache, and calls it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.files import cache_folder
from attnopt.pattern import Pattern
from attnopt.spec import AttentionSpec

BLOCK = 64
_SOURCE = Path(__file__).with_name("attend.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 300  # more than any compiler needs, so that a stuck one does not hang the program


class NoKernelError(Exception):
    """Why there is no compiled kernel on this machine."""


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row", "col")]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "bias", "sinks", "mask", "selected", "out")),
        *((name, ctypes.c_int64) for name in ("batches", "heads", "q_len", "kv_len", "head_dim", "value_dim")),
        *((f"{name}_at", _Strides) for name in ("q", "k", "v", "bias", "sinks", "mask", "selected", "out")),
        *((name, ctypes.c_void_p) for name in ("kv_of_head", "layout_of_head", "row_ptr", "cols", "tile", "tiles")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class _Table:
    """The layouts of a pattern's heads, in the form that the kernel reads."""

    layout_of_head: NDArray[np.int32]
    row_ptr: NDArray[np.int64]
    cols: NDArray[np.int32]
    tile: NDArray[np.int32]
    tiles: NDArray[np.uint64]


def attend(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    selected: Tensor | None,
) -> Tensor:
    """``spec`` without its gains, computed in float32 on a CPU; ``selected`` as in ``attnopt::attention``.

    The output has the strides of [B, L, H, Dv], so that merging the heads copies nothing.  Raises NoKernelError.
    """
    kernel = library()
    B, H, L, D = q.shape
    S, Dv = k.shape[2], v.shape[3]
    dtype = v.dtype
    out = q.new_empty(B, L, H, Dv, dtype=torch.float32).transpose(1, 2)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q.float(), k.float(), v.float()))
    bias, sinks = (None if t is None else t.float() for t in (bias, sinks))
    table = _table(spec.pattern, H, L, S)
    heads = np.asarray(spec.kv_of_head, np.int32)
    operands = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks, "mask": mask, "selected": selected, "out": out}
    arguments = _Arguments(
        **{name: None if t is None else t.data_ptr() for name, t in operands.items()},
        **{f"{name}_at": _strides(t) for name, t in operands.items() if t is not None},
        batches=B,
        heads=H,
        q_len=L,
        kv_len=S,
        head_dim=D,
        value_dim=Dv,
        kv_of_head=heads.ctypes.data,
        layout_of_head=table.layout_of_head.ctypes.data,
        row_ptr=table.row_ptr.ctypes.data,
        cols=table.cols.ctypes.data,
        tile=table.tile.ctypes.data,
        tiles=table.tiles.ctypes.data,
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
        threads=torch.get_num_threads(),
    )
    kernel.attnopt_attend(ctypes.byref(arguments))
    return out.to(dtype)


def _strides(t: Tensor) -> _Strides:
    return _Strides(*(0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)))


@lru_cache(maxsize=64)
def _table(pattern: Pattern, heads: int, q_len: int, kv_len: int) -> _Table:
    of_head = [pattern.for_head(h) for h in range(heads)] if pattern.is_per_head else [pattern] * heads
    distinct = list(dict.fromkeys(of_head))
    layouts = [p.layout(q_len, kv_len, BLOCK, BLOCK) for p in distinct]
    entries = np.cumsum([0, *(len(x.cols) for x in layouts)])
    shapes = np.cumsum([0, *(len(x.tiles) for x in layouts)])
    return _Table(
        np.asarray([distinct.index(p) for p in of_head], np.int32),
        np.concatenate([x.row_ptr + start for x, start in zip(layouts, entries, strict=False)]),
        np.concatenate([x.cols for x in layouts]),
        np.concatenate(
            [np.where(x.tile < 0, x.tile, x.tile + s) for x, s in zip(layouts, shapes, strict=False)]
        ).astype(np.int32),
        np.concatenate([_bits(x.tiles) for x in layouts]),
    )


def _bits(tiles: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """[T, queries, keys] as [T, keys] words: bit r is query r."""
    packed = np.packbits(tiles.transpose(0, 2, 1), axis=2, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").reshape(-1, BLOCK)


def why_not() -> str | None:
    """Why there is no kernel here, or None where there is one."""
    try:
        library()
    except NoKernelError as e:
        return str(e)
    return None


def library() -> ctypes.CDLL:
    """The compiled kernel.  Raises NoKernelError, at once if it failed before."""
    found = _built()
    if isinstance(found, str):
        raise NoKernelError(found)
    return found


@lru_cache(maxsize=1)
def _built() -> ctypes.CDLL | str:
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if compiler is None:
        return "there is no C++ compiler (g++, clang++, or the one that CXX names)"
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as e:
        return f"{compiler} failed: {e.stderr.strip()[-300:]}"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{compiler}: {e}"


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    mark = hashlib.sha256("\0".join((_SOURCE.read_text(), version, *_FLAGS, _machine())).encode()).hexdigest()[:24]
    path = cache_folder() / f"attend-{mark}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
        for threads in (["-fopenmp"], []):  # a compiler may lack OpenMP: then one thread does the work
            done = subprocess.run([*command, *threads], capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, path)
    return path


def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
