"""``attnopt demo``: a trained sentence encoder, from the model in torch to a smaller one in ONNX Runtime."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.base.progress import watched
from attnopt.errors import AttnoptError, ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnopt.cli.demo_data import Array, Data, Encode
    from attnopt.ir.site import Site
    from attnopt.model import OptimizedModel

# Half of the layers get a window, the other half lose their weakest heads; this is fixed.  Which layers and
# which heads is decided by news texts (Lee's background) that the table's evaluation sets do not contain.
WINDOW, SINKS = 16, 1
PRUNED_PER_LAYER = 2
LENGTHS = ((1, 16), (8, 128), (1, 512))  # batch x tokens of the latency rows


@dataclass(frozen=True)
class Contender:
    """One column of the final table."""

    name: str
    encode: Encode
    parameters: int
    megabytes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="build/demo", help="output folder (default: build/demo)")
    parser.add_argument("--quick", action="store_true", help="use fewer calibration texts and timing repeats")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.  Raises AttnoptError."""
    parser = argparse.ArgumentParser(prog="attnopt demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from attnopt.cli import demo_data as similarity

    similarity.require_packages()
    say = _quiet if arguments.json else _say

    import attnopt
    from attnopt.render.numbers import amount

    model, tokenizer = similarity.load_encoder()
    data = similarity.load_data()
    example = similarity.tokens(tokenizer, data.background[:3])

    say("1. What is in the model?")
    found = attnopt.inspect(model, example)
    say(found)

    count = 32 if arguments.quick else 96
    scoring, choosing = data.background[:count], data.background[count : count + count // 2]
    say(
        f"2. Where does it cost least?  (heads scored on {len(scoring)} news texts, layers chosen on {len(choosing)} others)"
    )
    optimize = _optimizer(example)
    importance = _importance(model, tokenizer, scoring, found.sites)
    heads = _weakest(importance, found.sites)
    policy, costs = _policy(model, optimize, tokenizer, choosing, heads)
    say("\n".join(_told(costs, policy)))

    say("3. Rewrite, verify, export.")
    fused, fast = optimize(model, "fuse"), optimize(model, policy)
    say(fast.report)
    out = _folder(arguments.out)
    files = {
        "model": out / "model.onnx",
        "original": out / "original.onnx",
        "report": out / "report.html",
        "data": out / "report.json",
    }
    fused.export_onnx(files["original"])
    fast.export_onnx(files["model"])
    fast.report.with_importance(importance).to_html(files["report"])

    say("4. Is it as good, and is it faster?")
    contenders = _contenders(model, fast, files)
    table = _measured(contenders, tokenizer, data, repeats=7 if arguments.quick else 31)
    _write_json(files["data"], {"measured": table, "report": fast.report.to_json()})
    if arguments.json:
        print(json.dumps({"measured": table, "files": {kind: str(path) for kind, path in files.items()}}, indent=2))
        return 0
    _print_measured(table, [contender.name for contender in contenders])
    say("\n".join(f"  {path}   {amount(1e6 * _file_megabytes(path))}B" for path in files.values()))
    return 0


def _optimizer(example: tuple[Tensor, Tensor]) -> Callable[[nn.Module, object], OptimizedModel]:
    """``attnopt.optimize`` for any batch and length."""
    import torch

    import attnopt

    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": dict(axes), "attention_mask": dict(axes)}
    return lambda model, policy: attnopt.optimize(model, policy, example, dynamic_shapes=shapes)


def _importance(
    model: nn.Module, tokenizer: object, texts: Sequence[str], sites: Sequence[Site]
) -> dict[str, tuple[float, ...]]:
    from attnopt.cli.demo_data import tokens
    from attnopt.compiler.importance import head_importance

    found = head_importance(model, [tokens(tokenizer, [text]) for text in texts], "output-norm", sites=sites)
    return dict(found)


def _weakest(scores: dict[str, tuple[float, ...]], sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """For each site the heads that add least to its layer's output."""
    ranked = {site.name: sorted(zip(scores[site.name], site.spec.heads, strict=True)) for site in sites}
    return {name: tuple(sorted(head for _, head in pairs[:PRUNED_PER_LAYER])) for name, pairs in ranked.items()}


def _policy(
    model: nn.Module, optimize: Callable[[nn.Module, object], OptimizedModel], tokenizer: object, texts: Sequence[str],
    heads: dict[str, tuple[int, ...]],
) -> tuple[dict[str, object], dict[str, float]]:  # fmt: skip
    """The policy of each site, and the cost of a window on it alone: the mean of 1 - cosine of the embeddings of ``texts``.

    The cheaper half of the sites gets the window, the other half loses its weakest heads.
    """
    from attnopt.cli.demo_data import embed
    from attnopt.passes.local_window import LocalWindow
    from attnopt.passes.prune_heads import PruneHeads

    window = LocalWindow(left=WINDOW, right=WINDOW, sinks=SINKS)
    original = embed(_torch_encode(model), tokenizer, texts)
    costs: dict[str, float] = {}
    for name in watched(list(heads), "trying a window on each layer"):
        changed = embed(_torch_encode(optimize(model, {name: window})), tokenizer, texts)
        costs[name] = float((1 - (original * changed).sum(1)).mean())
    windowed = sorted(costs, key=costs.__getitem__)[: len(costs) // 2]
    return {name: window if name in windowed else PruneHeads(heads=heads[name]) for name in heads}, costs


def _told(costs: dict[str, float], policy: dict[str, object]) -> Iterable[str]:
    yield "  1 - cosine of the embeddings with a window on this attention alone, and what it gets"
    for name, cost in costs.items():
        heads = getattr(policy[name], "heads", None)
        what = f"a window of {WINDOW} to each side and {SINKS} sink" if heads is None else f"without heads {heads}"
        yield f"  {name}   {cost:.4f}   {what}"


def _contenders(model: nn.Module, fast: nn.Module, files: dict[str, Path]) -> list[Contender]:
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, fast))
    original, optimized = files["original"], files["model"]
    return [
        Contender("original, torch", _torch_encode(model), before, _megabytes(model)),
        Contender("optimized, torch", _torch_encode(fast), after, _megabytes(fast)),
        Contender("original, ONNX", _onnx_encode(original), before, _file_megabytes(original)),
        Contender("optimized, ONNX", _onnx_encode(optimized), after, _file_megabytes(optimized)),
    ]


def _megabytes(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def _file_megabytes(path: Path) -> float:
    """Including the external weight files of a large ONNX model."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6


def _torch_encode(model: nn.Module) -> Encode:
    import torch

    def encode(ids: Tensor, mask: Tensor) -> Array:
        with torch.inference_mode():
            vectors: Array = model(ids, mask).numpy()
            return vectors

    return encode


def _onnx_encode(path: Path) -> Encode:
    """One thread, so CPU time measures work, not waiting."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    if len(names) != 2:
        raise ExportError(f"{path} takes {names}, expected token ids and an attention mask")

    def encode(ids: Tensor, mask: Tensor) -> Array:
        vectors: Array = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0]
        return vectors

    return encode


def _measured(contenders: list[Contender], tokenizer: object, data: Data, repeats: int) -> dict[str, dict[str, float]]:
    """Row -> column -> number."""
    import torch

    from attnopt.cli.demo_data import quality

    rows: dict[str, dict[str, float]] = {}
    for contender in contenders:
        for metric, value in quality(contender.encode, tokenizer, data).items():
            rows.setdefault(metric, {})[contender.name] = value
    rows["parameters, millions"] = {c.name: c.parameters / 1e6 for c in contenders}
    rows["size, MB"] = {c.name: c.megabytes for c in contenders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch, length in LENGTHS:
            ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            calls = {c.name: _call(c.encode, ids, mask) for c in contenders}
            rows[f"CPU ms, {batch} x {length} tokens"] = _interleaved(calls, repeats)
    finally:
        torch.set_num_threads(threads)
    return rows


def _call(encode: Encode, ids: Tensor, mask: Tensor) -> Callable[[], object]:
    return lambda: encode(ids, mask)


def _interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU time in milliseconds; candidates are interleaved, so background load affects all of them equally."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat >= 2:  # the first two warm up
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _print_measured(table: dict[str, dict[str, float]], columns: list[str]) -> None:
    from rich import box
    from rich.table import Table

    from attnopt.render.tables import to_text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    for row, values in table.items():
        digits = 3 if row.startswith(("Lee", "WordSim", "SimLex")) else 2
        shown.add_row(row, *(f"{values[column]:.{digits}f}" for column in columns))
    print("Measured in this run: one thread, no retraining")
    print(to_text(shown, width=110), end="\n\n")


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttnoptError(
            f"cannot create the folder {path}: {error.strerror}", hint="choose another folder with --out"
        ) from error
    return path


def _write_json(path: Path, data: object) -> None:
    from attnopt.base.atomic_files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def _say(what: object) -> None:
    print(what, end="\n\n", flush=True)


def _quiet(what: object) -> None:
    print(str(what).splitlines()[0], file=sys.stderr, flush=True)
