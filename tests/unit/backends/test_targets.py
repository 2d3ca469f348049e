"""The compiled kernel is C++ for every processor, not only for that of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest

from attnopt.backends import native

X86 = ("x86-64", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids")  # scalar ... pairs, tiles of Intel AMX
ARM = ("armv8-a", "armv8.6-a+bf16")
TARGETS = {"x86_64": X86, "aarch64": ARM}.get(platform.machine(), ())
COMPILER = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_for(target: str) -> None:
    flags = [flag for flag in native._FLAGS if not flag.startswith("-march")]
    command = [str(COMPILER), *flags, f"-march={target}", "-fsyntax-only", str(native._SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "-march=" in done.stderr or "unknown target CPU" in done.stderr:
        pytest.skip(f"this compiler does not know {target}")
    assert done.returncode == 0, done.stderr
