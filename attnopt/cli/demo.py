"""``attnopt demo``: a trained sentence encoder, or a model of the user's, from torch to small files for ONNX Runtime."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.base.progress import working
from attnopt.errors import AttnoptError, ExportError, PolicyError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnopt.base.call_inputs import CallInputs
    from attnopt.cli.demo_data import Array, Encode
    from attnopt.cli.demo_policy import Batches
    from attnopt.cli.demo_ways import Way
    from attnopt.model import OptimizedModel
    from attnopt.policy_search.result import Search

Table = dict[str, dict[str, float]]  # row -> column -> number
Say = Callable[[object], None]
SIZES = ((1, 16), (8, 128), (1, 512))  # batch x tokens of the encoder's rows
EXAMPLE = 250  # characters of an example text
ROUNDS, QUICK_ROUNDS = 5, 3
LOOKED_AT = 4  # batches that tell the importance of heads


def add_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    parser.add_argument("--model", metavar="NAME", help=f"a model of your own instead: {model_help}")
    parser.add_argument(
        "--policy", help="how to rewrite --model: text, or a YAML or JSON file (default: fuse, which is exact)"
    )
    parser.add_argument("--out", metavar="DIR", default="build/demo", help="output folder (default: build/demo)")
    parser.add_argument("--quick", action="store_true", help="use fewer timing repeats")


def run(arguments: argparse.Namespace) -> int:
    """Raises AttnoptError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    say = _quiet if arguments.json else _say
    if arguments.policy is not None and arguments.model is None:
        raise AttnoptError("--policy is for a model of your own", hint="add --model package.module:factory")
    result = _of_encoder(arguments, say) if arguments.model is None else _of_own(arguments, say)
    report = Path(arguments.out) / "report.json"
    _write_json(report, {"measured": result.table, "report": result.fast.report.to_json()})
    files = {**result.files, "data": report}
    if arguments.json:
        print(json.dumps({"measured": result.table, "files": {k: str(p) for k, p in files.items()}}, indent=2))
        return 0
    _print(result.table)
    from attnopt.cli.demo_ways import file_megabytes

    say("\n".join(f"  {path}   {file_megabytes(path):.1f} MB" for path in files.values()))
    return 0


@dataclass(frozen=True)
class Result:
    """``files``: what was written, by kind."""

    fast: OptimizedModel
    table: Table
    files: Mapping[str, Path]


def _of_encoder(arguments: argparse.Namespace, say: Say) -> Result:
    """MiniLM, with a policy that is chosen here, and judged on texts that people compared."""
    import torch

    import attnopt
    from attnopt.base.call_inputs import CallInputs
    from attnopt.cli import demo_data, demo_policy

    demo_data.require_packages()
    out = _folder(arguments.out)
    model, tokenizer = demo_data.load_encoder()
    data = demo_data.load_data()
    inputs = CallInputs(demo_data.tokens(tokenizer, [text[:EXAMPLE] for text in data.background[:3]]), {})
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic, 1: dynamic} for name in ("input_ids", "attention_mask")}

    say("1. What is in the model?")
    found = attnopt.inspect(model, *inputs)
    say(found)
    batches = demo_policy.sequences(tokenizer, data.background)
    best = _searched(model, batches, inputs, shapes, say)
    exact = partial(attnopt.optimize, model, "fuse", *inputs, dynamic_shapes=shapes)
    fast = _rewritten(best.optimize if best else exact, say)
    files, ways = _deployed(model, fast, inputs, shapes, out, say)
    importance = attnopt.head_importance(model, batches[:LOOKED_AT], "output-norm")
    files["report"] = fast.report.with_importance(importance).to_html(out / "report.html")
    if best:
        files["search"] = best.report.to_html(out / "search.html")

    say("4. Is it as good, and is it faster?")
    table: Table = {}
    for way in ways:
        judged = demo_data.quality(_encode(way), tokenizer, data)
        for row, value in judged.items():
            table.setdefault(row, {})[way.name] = value
    _measure(table, ways, {f"{b} x {n} tokens": _noise(b, n) for b, n in SIZES}, arguments.quick)
    return Result(fast, table, files)


def _searched(model: nn.Module, batches: Batches, inputs: CallInputs, shapes: object, say: Say) -> Search | None:
    from attnopt.cli import demo_policy

    for share in demo_policy.LATENCIES:
        say(f"2. Which attention gets a window, which loses heads, within {share:.0%} of the latency?")
        try:
            with working("searching"):
                best = demo_policy.searched(model, batches, inputs, shapes, share)
        except PolicyError as error:
            say(f"  {error}")
            continue
        say(best)
        return best
    say("  The model is left exact.")
    return None


def _of_own(arguments: argparse.Namespace, say: Say) -> Result:
    """The user's model, on its own example inputs."""
    from torch.utils import _pytree as pytree

    import attnopt
    from attnopt.base.call_inputs import CallInputs
    from attnopt.base.closeness import tensors
    from attnopt.cli.demo_ways import cosine
    from attnopt.cli.load_model import resolve
    from attnopt.cli.onnx_inputs import Given, is_onnx
    from attnopt.cli.output import require_model

    if is_onnx(arguments.model):
        raise AttnoptError(
            f"{arguments.model} is an ONNX file; the demo starts from a model in torch",
            hint=f"rewrite it with `attnopt optimize {arguments.model} --onnx fast.onnx`, and compare with `attnopt bench`",
        )
    named = resolve(arguments.model, Given(None, {}, needs_sizes=False))
    require_model(arguments.model, named, "the demo starts from the original")
    out = _folder(arguments.out)
    inputs = CallInputs(named.args, named.kwargs)

    say("1. What is in the model?")
    say(attnopt.inspect(named.model, *inputs))
    say(f"2. The policy: {arguments.policy or 'fuse, which is exact; --policy changes more'}")
    fast = _rewritten(partial(attnopt.optimize, named.model, arguments.policy or "fuse", *inputs), say)
    files, ways = _deployed(named.model, fast, inputs, None, out, say)
    files["report"] = fast.report.to_html(out / "report.html")

    say("4. Does it compute the same, and is it faster?")
    given = tensors(pytree.tree_leaves(tuple(inputs)))
    table: Table = {"cosine to the model's output": {way.name: cosine(way, ways[0], given) for way in ways}}
    _measure(table, ways, {"on the example inputs": given}, arguments.quick)
    return Result(fast, table, files)


def _rewritten(build: Callable[[], OptimizedModel], say: Say) -> OptimizedModel:
    say("3. Rewrite, verify, export.")
    with working("rewriting"):
        fast = build()
    say(fast.report)
    return fast


def _deployed(
    model: nn.Module, fast: OptimizedModel, inputs: CallInputs, shapes: object, out: Path, say: Say
) -> tuple[dict[str, Path], list[Way]]:
    """The files, and the columns of the table: the model itself first."""
    import attnopt
    from attnopt.cli.demo_ways import in_onnxruntime, in_torch, others

    ways = [in_torch(model, inputs), *others(model, inputs, shapes, out / "torch.onnx", say)]
    is_exact = all(p == "fuse" for site in fast.report.sites for p in site.passes)
    files = {"exact": out / "exact.onnx", "int8": out / ("exact.int8.onnx" if is_exact else "rewritten.int8.onnx")}
    with working("exporting"):
        exact = fast if is_exact else attnopt.optimize(model, "fuse", *inputs, dynamic_shapes=shapes)
        exact.export_onnx(files["exact"])
    ways.append(in_onnxruntime("attnopt", files["exact"]))
    try:
        with working("exporting in int8"):
            told = fast.export_onnx(files["int8"], quantize="int8")
    except ExportError as error:  # too far from the model, or nothing to quantize: the rest stands
        say(f"  int8 is left out: {error}")
        del files["int8"]
        return files, ways
    say(f"  {told}")
    ways.append(in_onnxruntime("attnopt, int8" if is_exact else "attnopt, rewritten, int8", files["int8"]))
    return files, ways


def _measure(table: Table, ways: Sequence[Way], rows: Mapping[str, Sequence[Tensor]], is_quick: bool) -> None:
    """Adds the size of each way, its CPU time on each of ``rows``, and how many times faster than the model that is."""
    from attnopt.cli.demo_ways import milliseconds

    table["MB"] = {way.name: way.megabytes for way in ways}
    for row, given in rows.items():
        times = milliseconds(ways, given, QUICK_ROUNDS if is_quick else ROUNDS, row)
        table[f"CPU ms, {row}"] = times
        table[f"times faster, {row}"] = {name: times[ways[0].name] / ms for name, ms in times.items()}


def _encode(way: Way) -> Encode:
    def encode(ids: Tensor, mask: Tensor) -> Array:
        vectors: Array = way.call((ids, mask))[0]
        return vectors

    return encode


def _noise(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask of ones, [batch, length]."""
    import torch

    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def _print(table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable

    from attnopt.render.tables import to_text

    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    columns = list(next(iter(table.values())))
    for column in columns:
        shown.add_column(column, justify="right")
    for row, values in table.items():
        digits = 1 if row.startswith(("MB", "CPU")) else 2 if row.startswith("times") else 3
        shown.add_row(row, *(f"{values[column]:.{digits}f}" for column in columns))
    print("Measured in this run: one thread of the CPU, nothing retrained")
    print(to_text(shown, width=150), end="\n\n")


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttnoptError(
            f"cannot create the folder {path}: {error.strerror}", hint="choose another folder with --out"
        ) from error
    return path


def _write_json(path: Path, data: Any) -> None:
    from attnopt.base.atomic_files import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def _say(what: object) -> None:
    print(what, end="\n\n", flush=True)


def _quiet(what: object) -> None:
    print(str(what).splitlines()[0], file=sys.stderr, flush=True)
