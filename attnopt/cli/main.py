"""The command line: ``attnopt inspect|optimize|export|explain|diff|search|heads|bench|demo|passes|doctor``.

Exit codes: 0 all went well, 1 a deliberate error (its message on stderr), 2 a wrong command line, 3 an internal error,
130 interrupted.  ``diff MODEL FILE``: 0 the same, 1 they differ, 2 could not be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attnopt.cli.output import warnings_told
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # what add_subparsers returns

MODEL_HELP = "package.module:factory, which returns (model, args) or (model, args, kwargs)"
OR_FILE = MODEL_HELP + "; or an .onnx file"
OR_SAVED = OR_FILE + "; or a saved folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings_told():
            code: int = arguments.run(arguments)
            return code
    except AttnoptError as error:
        print(f"attnopt: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"attnopt: internal error, please report it: {_told(error)}", file=sys.stderr)
        print("  hint: rerun the command with --debug for a traceback", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("attnopt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnopt", description="A compiler for attention in PyTorch.")
    commands = parser.add_subparsers(metavar="command", required=True)
    every = (
        _add_inspect,
        _add_optimize,
        _add_export,
        _add_explain,
        _add_diff,
        _add_search,
        _add_heads,
        _add_bench,
        _add_demo,
        _add_passes,
        _add_doctor,
    )
    for add in every:
        add(commands)
    return parser


def _add_inspect(commands: Commands) -> None:
    from attnopt.cli import optimize as cli_run

    parser = _command(
        commands,
        "inspect",
        cli_run.inspect,
        "show every attention of a model in its module tree",
        "attnopt inspect my_models:encoder",
        "attnopt inspect model.onnx",
    )
    _add_model(parser, OR_SAVED)
    _add_dynamic(parser)


def _add_optimize(commands: Commands) -> None:
    from attnopt.cli import data
    from attnopt.cli import optimize as cli_run

    parser = _command(
        commands,
        "optimize",
        cli_run.optimize,
        "rewrite a model's attentions",
        'attnopt optimize my_models:encoder --policy "local-window(left=128)" --out fast --html report.html',
        'attnopt optimize model.onnx --dynamic --policy "local-window(left=128)" --onnx fast.onnx',
        "attnopt optimize my_models:encoder --policy policy.yaml --data texts.npz --out fast",
    )
    _add_model(parser, OR_FILE)
    _add_optimizing(parser)
    data.add_arguments(parser, size=16, default="none; passes that are fitted to data need some")
    parser.add_argument("--out", metavar="DIR", help="save the optimized model in this folder")
    parser.add_argument("--onnx", metavar="FILE", help="also export it to ONNX")
    _add_quantize(parser)
    parser.add_argument("--html", metavar="FILE", help="write the report as an HTML page")
    parser.add_argument("--time", action="store_true", help="measure one call of both models for the report")


def _add_export(commands: Commands) -> None:
    from attnopt.cli import optimize as cli_run

    parser = _command(
        commands,
        "export",
        cli_run.export,
        "export a model to ONNX and check it against ONNX Runtime",
        "attnopt export my_models:encoder --dynamic --onnx encoder.onnx",
        "attnopt export my_models:encoder --dynamic --quantize int8 --onnx encoder.onnx",
        "attnopt export model.onnx --size batch=1 --size length=128 --onnx fused.onnx",
    )
    _add_model(parser, OR_SAVED)
    _add_optimizing(parser)
    parser.add_argument("--onnx", metavar="FILE", required=True, help="the file to write")
    _add_quantize(parser)
    parser.add_argument("--html", metavar="FILE", help="write the report as an HTML page")


def _add_explain(commands: Commands) -> None:
    from attnopt.cli import compare as cli_compare

    parser = _command(
        commands,
        "explain",
        cli_compare.explain,
        "show step by step why one attention was matched, missed or refused",
        'attnopt explain my_models:encoder encoder.layer.0.attention.self --policy "grouped-query(kv_heads=4)"',
    )
    _add_model(parser, OR_FILE)
    parser.add_argument("site", help="name of an attention or near miss; (root) for the model itself")
    _add_dynamic(parser)
    parser.add_argument(
        "--policy", help="policy whose passes are checked (default: every installed pass that needs no options)"
    )


def _add_diff(commands: Commands) -> None:
    from attnopt.cli import compare as cli_compare

    parser = _command(
        commands,
        "diff",
        cli_compare.diff,
        "show what a policy changes in the graph, as code; with FILE: whether an exported file has the model's attentions "
        "(exit code 0: the same, 1: they differ, 2: could not be compared)",
        'attnopt diff my_models:encoder --policy "local-window(left=128)" --site encoder.layer.0.attention.self',
        "attnopt diff my_models:encoder exported.onnx",
    )
    parser.add_argument("model", help=OR_FILE)
    parser.add_argument("file", nargs="?", metavar="FILE", help="an .onnx file that some exporter made of the model")
    _add_inputs(parser)
    _add_optimizing(parser)
    parser.add_argument("--site", help="show only the changes of this attention")


def _add_search(commands: Commands) -> None:
    from attnopt.cli import search

    parser = _command(
        commands,
        "search",
        search.run,
        "find the policy within a budget that changes the outputs least",
        "attnopt search my_models:encoder --data my_data:batches --latency 0.6 --at 1,512 --html front.html",
        "attnopt search my_models:encoder --data texts.txt --tokenizer folder --latency 0.6 --out policy.yaml",
    )
    _add_model(parser, MODEL_HELP)
    search.add_arguments(parser)


def _add_heads(commands: Commands) -> None:
    from attnopt.cli import data, heads

    parser = _command(
        commands,
        "heads",
        heads.run,
        "show what every head does: its mean attention map, how far it looks, its kind, and statistics",
        "attnopt heads my_models:encoder --data texts.npz --what locality,entropy,sink-mass --html atlas.html",
        "attnopt heads my_models:decoder --data needles.npz --what retrieval,induction --html atlas.html",
    )
    _add_model(parser, OR_FILE)
    data.add_arguments(parser, size=8, default="the model's example inputs")
    parser.add_argument(
        "--what",
        default="locality",
        metavar="NAMES",
        help="statistics, separated by commas: methods of attnopt.head_importance, with options as in "
        '"sink-mass(keys=4)", or package.module:function (default: locality)',
    )
    parser.add_argument("--sites", action="append", metavar="GLOB", help="only these attentions; repeatable")
    parser.add_argument("--distance", help='how far apart tokens are, as in "distance(grid=(14, 14), prefix=1)"')
    parser.add_argument("--clusters", type=data.least_one, default=6, metavar="N", help="kinds of heads (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the clusters (default: 0)")
    parser.add_argument("--html", metavar="FILE", help="write the atlas as an HTML page")


def _add_bench(commands: Commands) -> None:
    from attnopt.cli import compare as cli_compare

    parser = _command(
        commands,
        "bench",
        cli_compare.bench,
        "compare the CPU time of two models in interleaved runs",
        "attnopt bench my_models:encoder fast --rounds 31",
        "attnopt bench model.onnx fast.onnx --size batch=1 --size length=512",
    )
    parser.add_argument("first", help=OR_SAVED + ". An .onnx file runs in ONNX Runtime")
    parser.add_argument("second", help="the same")
    _add_inputs(parser)
    parser.add_argument("--rounds", type=_rounds, default=15, metavar="N", help="calls of each model (default: 15)")


def _add_demo(commands: Commands) -> None:
    from attnopt.cli import demo

    parser = _command(
        commands,
        "demo",
        demo.run,
        "optimize a trained sentence encoder, or a model of your own, deploy it, and compare it with other ways to run it",
        "attnopt demo --out build/demo --quick",
        'attnopt demo --model my_models:encoder --policy "local-window(left=128)"',
    )
    demo.add_arguments(parser, MODEL_HELP)


def _add_passes(commands: Commands) -> None:
    from attnopt.cli import optimize as cli_run

    _command(
        commands,
        "passes",
        cli_run.passes,
        "list the installed passes and backends with their options",
        "attnopt passes --json",
    )


def _add_doctor(commands: Commands) -> None:
    from attnopt.cli import doctor

    _command(
        commands,
        "doctor",
        doctor.run,
        "show what this machine and its packages offer, and what is missing for what",
        "attnopt doctor",
    )


def _command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str, *examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an internal error")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("model", help=what)
    _add_inputs(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inputs", metavar="FILE", help="example inputs of an .onnx file: an .npz with one array per input name"
    )
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        default=[],
        metavar="AXIS=N",
        help="size of a free axis of an .onnx file, for which synthetic inputs are generated; repeatable",
    )


def _add_optimizing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", default="fuse", help="policy text, or a YAML or JSON file (default: fuse, which is exact)"
    )
    parser.add_argument("--backend", default="auto", help="backend name (default: auto, the cheapest exact one)")
    _add_dynamic(parser)
    parser.add_argument("--limit", type=_count, metavar="N", help="apply only the first N rewrites")
    parser.add_argument("--strict", action="store_true", help="fail if a pass refuses an attention")
    parser.add_argument("--tolerance", type=_positive, help="fail if the relative change of the output exceeds this")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the passes (default: 0)")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="quantize the weights of products in the ONNX file, not its attentions",
    )


def _add_dynamic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dynamic", action="store_true", help="make every axis dynamic that the model allows")


def _told(error: Exception) -> str:
    (first, *_) = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _count(text: str) -> int:
    n = int(text)
    if n < 0:
        raise argparse.ArgumentTypeError("a number of rewrites, 0 or more")
    return n


def _size(text: str) -> tuple[str, int]:
    axis, _, size = text.rpartition("=")
    if not axis or not size.isdecimal() or int(size) < 1:
        raise argparse.ArgumentTypeError("an axis and its size, as in length=128")
    return axis, int(size)


def _rounds(text: str) -> int:
    n = int(text)
    if n < 2:
        raise argparse.ArgumentTypeError("a number of rounds, 2 or more")
    return n


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("a number above 0")
    return value
