"""Which processor this machine has, as Linux tells it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path


def processor() -> str:
    """Its name, family and model: names alone are shared by generations."""
    found = _described()
    numbers = [
        f"{short} {found[name]}" for short, name in (("family", "cpu family"), ("model", "model")) if name in found
    ]
    return " ".join([found.get("model name", platform.processor() or platform.machine()), *numbers])


def instructions() -> str:
    """The names of the instructions that it has."""
    found = _described()
    return found.get("flags") or found.get("Features") or processor()


@lru_cache(maxsize=1)
def _described() -> Mapping[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
