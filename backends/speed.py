"""How fast the CPU of this machine computes each form of attention: measured once, then stored in the user's cache
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.backends import native
from attnopt.base.atomic_files import cache_folder
from attnopt.base.processor import processor
from attnopt.ir.site import Site

_LENGTH, _HEADS, _HEAD_DIM = 1024, 4, 64
_ROUNDS = 3
_EMPTY_CALLS = 50  # each of which is too short to be measured well
GPU_RATE = 1e13  # without a measurement, only ratios matter


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second for the pairs that a form computes, and the seconds of an empty call."""

    dense: float  # SDPA without a mask
    causal: float  # SDPA with is_causal, all pairs counted
    masked: float  # SDPA with a mask
    blocked: float  # ``attnopt::attention``, visited pairs counted
    dense_call: float
    blocked_call: float


def dense_flops(site: Site) -> float:
    """Of both products, masked pairs included."""
    spec = site.spec
    return 2.0 * site.batch * spec.num_heads * site.q_len * site.kv_len * (spec.head_dim + spec.value_dim)


def of_cpu(site: Site) -> Speed:
    """Of this machine, in the precision of ``site``, with the number of threads that torch uses now."""
    return _of_cpu(torch.get_num_threads(), _precision(site))


def _precision(site: Site) -> torch.dtype:
    """That of its weights, or of the example inputs where they are unknown."""
    weights = (site.parameters.get(p.weight) for p in site.projections.values() if p.weight is not None)
    found = [x.dtype for x in (*weights, *site.inputs.values()) if x is not None and x.dtype.is_floating_point]
    return found[0] if found and found[0] in (torch.bfloat16, torch.float16) else torch.float32


@lru_cache
def _of_cpu(threads: int, dtype: torch.dtype) -> Speed:
    path = _cache_file(threads, dtype)
    try:
        return Speed(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        speed = _measured(dtype)
    try:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(speed)))
        os.replace(temporary, path)
    except OSError:
        pass  # measured again by the next process
    return speed


def machine() -> tuple[object, ...]:
    """What the times of a model depend on beside the model and the number of threads."""
    return torch.__version__, native.version(), platform.platform(), processor(), os.cpu_count()


def _cache_file(threads: int, dtype: torch.dtype) -> Path:
    about = (*machine(), threads, dtype)
    return cache_folder() / f"speed-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"


def _measured(dtype: torch.dtype) -> Speed:
    attention = torch.ops.attnopt.attention

    def sizes(length: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = torch.randn(3, 1, _HEADS, length, _HEAD_DIM).to(dtype).unbind()
        return q, k, v

    def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = attention(q, k, v, None, None, None, "Full()", list(range(_HEADS)), _HEAD_DIM**-0.5, None)
        return o

    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        operands, tiny = sizes(_LENGTH), sizes(8)
        mask = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()
        flops = 4.0 * _HEADS * _LENGTH**2 * _HEAD_DIM
        return Speed(
            dense=flops / _seconds(lambda: F.scaled_dot_product_attention(*operands)),
            causal=flops / _seconds(lambda: F.scaled_dot_product_attention(*operands, is_causal=True)),
            masked=flops / _seconds(lambda: F.scaled_dot_product_attention(*operands, attn_mask=mask)),
            blocked=flops / _seconds(lambda: blocked(*operands)),
            dense_call=_seconds(lambda: F.scaled_dot_product_attention(*tiny), _EMPTY_CALLS),
            blocked_call=_seconds(lambda: blocked(*tiny), _EMPTY_CALLS),
        )


def _seconds(work: Callable[[], Tensor], rounds: int = _ROUNDS) -> float:
    work()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)  # the least disturbed
