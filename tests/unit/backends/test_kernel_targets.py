"""The compiled kernel is C++ for every processor, not only for that of this machine."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch
from needs import needs_compiler

from attnopt.backends import native, speed

X86 = ("x86-64", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids")  # scalar ... pairs, tiles of Intel AMX
ARM = ("armv8-a", "armv8.6-a+bf16")
TARGETS = {"x86_64": X86, "aarch64": ARM}.get(platform.machine(), ())


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_for(target: str) -> None:
    flags = [flag for flag in native._FLAGS if not flag.startswith("-march")]
    command = [str(native.compiler()), *flags, f"-march={target}", "-fsyntax-only", str(native._SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "-march=" in done.stderr or "unknown target CPU" in done.stderr:
        pytest.skip(f"this compiler does not know {target}")
    assert done.returncode == 0, done.stderr


def test_speeds_are_of_the_kernel_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = speed._cache_file(1, torch.float32)
    monkeypatch.setattr(native, "version", lambda: "")
    assert speed._cache_file(1, torch.float32) != own
