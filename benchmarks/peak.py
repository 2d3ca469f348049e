"""The most that one core of this machine multiplies and adds, measured in registers alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from attnopt.backends import native
from attnopt.backends.native import Form

PEAKS = {Form.FLOAT32: "singles", Form.PAIRS: "pairs", Form.TILES: "tiles"}  # functions of peak.cpp


@lru_cache
def peak_rates() -> dict[Form, float]:
    """Operations a second of one core, the best of some tries."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run(
            [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", made], check=True
        )
        loops = ctypes.CDLL(str(made))

    def rate(name: str) -> float:
        loop: Callable[[int], float] = getattr(loops, name)
        loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_double  # type: ignore[attr-defined]
        found = []
        for _ in range(20):
            start = time.process_time()
            done = loop(1_000_000)
            found.append(done / (time.process_time() - start))
        return max(found)

    best = Form(native.library().attnopt_best_form())  # which asks for tiles
    return {form: rate(name) for form, name in PEAKS.items() if form <= best}
