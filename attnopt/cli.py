"""The command line: ``attnopt inspect|optimize|export|demo|passes``.

Exit codes: 0 all went well, 1 a deliberate error (its message on stderr), 2 a wrong command line, 3 an internal error,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError, AttnoptWarning

if TYPE_CHECKING:
    from attnopt.cli_model import Named

MODEL_HELP = "package.module:factory, which returns (model, args) or (model, args, kwargs); or a saved folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with _warnings_told():
            code: int = arguments.run(arguments)
            return code
    except AttnoptError as error:
        print(f"attnopt: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"attnopt: internal error, please report it: {_told(error)}", file=sys.stderr)
        print("  hint: the same command with --debug shows where it came from", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("attnopt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnopt", description="A compiler for attention in PyTorch.")
    commands = parser.add_subparsers(metavar="command", required=True)

    inspect = _command(
        commands, "inspect", _inspect, "list every attention of a model", "attnopt inspect my_models:encoder"
    )
    inspect.add_argument("model", help=MODEL_HELP)

    optimize = _command(
        commands,
        "optimize",
        _optimize,
        "rewrite a model's attentions",
        'attnopt optimize my_models:encoder --policy "local-window(left=128)" --out fast --html report.html',
    )
    optimize.add_argument("model", help=MODEL_HELP)
    _add_optimizing(optimize)
    optimize.add_argument("--out", metavar="DIR", help="save the optimized model in this folder")
    optimize.add_argument("--onnx", metavar="FILE", help="also export it to ONNX")

    export = _command(
        commands,
        "export",
        _export,
        "write a model as ONNX and check it in ONNX Runtime",
        "attnopt export my_models:encoder --dynamic --onnx encoder.onnx",
    )
    export.add_argument("model", help=MODEL_HELP)
    _add_optimizing(export)
    export.add_argument("--onnx", metavar="FILE", required=True, help="the file to write")

    from attnopt import demo

    demonstration = _command(
        commands,
        "demo",
        demo.run,
        "optimize and deploy a trained sentence encoder",
        "attnopt demo --out build/demo --quick",
    )
    demo.add_arguments(demonstration)

    _command(commands, "passes", _passes, "list the installed passes and backends", "attnopt passes --json")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an internal error")
    parser.set_defaults(run=run)
    return parser


def _add_optimizing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", default="fuse", help="a short text or a YAML or JSON file (default: fuse, which is exact)"
    )
    parser.add_argument(
        "--backend", default="auto", help="a backend's name (default: auto, the cheapest that is exact)"
    )
    parser.add_argument("--dynamic", action="store_true", help="keep batch and sequence axes dynamic")
    parser.add_argument("--limit", type=_count, metavar="N", help="apply only the first N rewrites")
    parser.add_argument("--strict", action="store_true", help="fail if a pass refuses an attention")
    parser.add_argument("--tolerance", type=_positive, help="fail if the output changes by more than this, relatively")
    parser.add_argument("--seed", type=int, default=0, help="for passes that use chance (default: 0)")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")


def _inspect(arguments: argparse.Namespace) -> int:
    from attnopt.cli_model import resolve
    from attnopt.tables import inspection_json, inspection_table, report_table

    with _working(f"loading {arguments.model}"):
        named = resolve(arguments.model)
    if named.saved is not None:
        report = _report_of(named)
        _show(arguments, report.to_json(), report_table(report))
        return 0
    import attnopt

    _require_inputs(arguments, named)
    with _working("looking for attentions"):
        found = attnopt.inspect(named.model, named.args, named.kwargs)
    _show(arguments, inspection_json(found), inspection_table(found))
    return 0


def _optimize(arguments: argparse.Namespace) -> int:
    from attnopt.cli_model import resolve

    with _working(f"loading {arguments.model}"):
        named = resolve(arguments.model)
    if named.saved is not None:
        raise AttnoptError(
            f"{arguments.model} is a saved model: it is optimized already",
            hint="optimize the model that it was made from; `attnopt export` turns a saved one into ONNX",
        )
    return _written(arguments, _optimized(arguments, named))


def _export(arguments: argparse.Namespace) -> int:
    from attnopt.cli_model import resolve

    with _working(f"loading {arguments.model}"):
        named = resolve(arguments.model)
    model = named.model if named.saved is not None else _optimized(arguments, named)
    return _written(arguments, model)


def _optimized(arguments: argparse.Namespace, named: Named) -> Any:
    import attnopt

    _require_inputs(arguments, named)
    with _working("optimizing"):
        return attnopt.optimize(
            named.model,
            arguments.policy,
            named.args,
            named.kwargs,
            dynamic_shapes="auto" if arguments.dynamic else None,
            backend=arguments.backend,
            tolerance=arguments.tolerance,
            strict=arguments.strict,
            limit=arguments.limit,
            seed=arguments.seed,
        )


def _require_inputs(arguments: argparse.Namespace, named: Named) -> None:
    if not named.args and not named.kwargs:
        raise AttnoptError(
            f"{arguments.model} gave a model without example inputs",
            hint="let it return (model, args) or (model, args, kwargs)",
        )


def _written(arguments: argparse.Namespace, model: Any) -> int:
    """Writes what was asked for, then shows the report and where things are."""
    from attnopt.tables import report_table

    report, written = model.report, {}
    if out := getattr(arguments, "out", None):
        with _working(f"saving {out}"):
            model.save(out)
        written["saved"] = out
    if arguments.onnx:
        with _working(f"exporting {arguments.onnx} and checking it in ONNX Runtime"):
            model.export_onnx(arguments.onnx)
        written["onnx"] = arguments.onnx
    if arguments.html:
        report.to_html(arguments.html)
        written["html"] = arguments.html
    _show(arguments, {"report": report.to_json(), "written": written}, report_table(report))
    if not arguments.json:
        for kind, path in written.items():
            print(f"{kind}: {path}")
    return 0


def _passes(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from attnopt import plugins
    from attnopt.tables import plugin_table

    found = plugins.describe()
    _show(arguments, [asdict(one) for one in found], plugin_table(found))
    return 0


def _report_of(named: Named) -> Any:
    model: Any = named.model
    return model.report


def _show(arguments: argparse.Namespace, data: Any, table: Any) -> None:
    from attnopt.tables import to_text

    if arguments.json:
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        return
    if not sys.stdout.isatty():
        print(to_text(table, width=160))  # a pipe has no width of its own
        return
    from rich.console import Console

    Console().print(table)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on stderr where somebody watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """attnopt's own warnings as one line each; those of others as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AttnoptWarning)
        as_before = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, AttnoptWarning):
                print(f"attnopt: warning: {message}", file=sys.stderr)
            else:
                as_before(message, category, *rest, **options)

        warnings.showwarning = show
        yield


def _told(error: Exception) -> str:
    (first, *_) = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _count(text: str) -> int:
    n = int(text)
    if n < 0:
        raise argparse.ArgumentTypeError("a number of rewrites, 0 or more")
    return n


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("a number above 0")
    return value
