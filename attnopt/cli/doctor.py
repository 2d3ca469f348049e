"""``attnopt doctor``: what this machine and its packages offer, and what is missing for what."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

from attnopt.base.processor import processor
from attnopt.cli.output import show

USES = {
    "": "everything",
    "demo": "attnopt demo",
    "search": "attnopt.search",
    "plot": "pictures of an atlas",
}  # of an extra of the distribution; the others serve its development


@dataclass(frozen=True)
class Finding:
    """``is_fine``: False where something is missing; ``note``: what it is for, and how to get it."""

    what: str
    found: str
    is_fine: bool
    note: str = ""


def run(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    findings = [*_machine(), *_kernels(), *_packages(), *_plugins()]
    table = Table(title="attnopt doctor", box=None, title_justify="left")
    for column in ("", "what", "found", "note"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row("ok" if f.is_fine else "--", f.what, f.found, f.note)
    show(arguments, [asdict(f) for f in findings], table)
    return 0


def _machine() -> Iterator[Finding]:
    import torch

    yield Finding("attnopt", metadata.version("attnopt"), True)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True)
    yield Finding("processor", processor(), True)
    yield Finding("threads of torch", str(torch.get_num_threads()), True)


def _kernels() -> Iterator[Finding]:
    import torch

    from attnopt.backends import native
    from attnopt.base.atomic_files import cache_folder

    reason = native.why_not()
    if reason is None:
        best = native.Form(native.library().attnopt_best_form())
        half = {
            native.Form.FLOAT32: "half precision in float32",
            native.Form.PAIRS: "bfloat16 in pairs of products",
            native.Form.TILES: "half precision in tiles",
        }
        yield Finding("CPU kernel", f"compiled: {torch.backends.cpu.get_cpu_capability()}, {half[best]}", True)
    else:
        note = "attention runs on torch operators instead; install a C++ compiler, or name one in CXX"
        yield Finding("CPU kernel", reason, False, note)
    yield Finding("cache of kernels and measurements", str(cache_folder()), True)
    if torch.cuda.is_available():
        yield Finding("GPU", torch.cuda.get_device_name(), True, "attention runs on FlexAttention")
    else:
        yield Finding("GPU", "torch sees none", False, "models run on the CPU")


def _packages() -> Iterator[Finding]:
    """What the distribution itself asks for."""
    from packaging.requirements import Requirement

    uses: dict[str, list[str]] = {}
    for text in metadata.requires("attnopt") or ():
        needed = Requirement(text)
        extras = [e for e in USES if needed.marker is None or needed.marker.evaluate({"extra": e})]
        if extras:
            uses.setdefault(f"{needed.name}{needed.specifier}", []).append(USES[extras[0]])
    for text, wanted_by in uses.items():
        needed = Requirement(text)
        version = _version(needed.name)
        is_fine = version is not None and needed.specifier.contains(version, prereleases=True)
        remedy = "" if is_fine else f'; pip install "{text}"'
        yield Finding(needed.name, version or "not installed", is_fine, f"for {' and '.join(wanted_by)}{remedy}")
    if _version("onnxruntime") is not None:
        import onnxruntime

        yield Finding("providers of ONNX Runtime", ", ".join(onnxruntime.get_available_providers()), True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plugins() -> Iterator[Finding]:
    from attnopt.compiler import plugins

    for row in plugins.describe():
        if row.distribution != plugins.OURS:
            yield Finding(f"{row.kind} {row.name}", row.distribution, not row.error, row.error)
