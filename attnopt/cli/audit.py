"""``attnopt diff MODEL FILE``: a model beside a file that was exported from it."""

from __future__ import annotations

import argparse
import sys

from attnopt.base.progress import working
from attnopt.cli.output import require_model, show
from attnopt.errors import AttnoptError
from attnopt.report.audit import EXIT_CODES


def run(arguments: argparse.Namespace) -> int:
    """0: the same, 1: they differ, 2: could not be compared, errors included."""
    from attnopt.audit.diff import diff
    from attnopt.cli.load_model import resolve
    from attnopt.cli.onnx_inputs import Given, is_onnx, require_onnx
    from attnopt.render.audit import audit_table

    try:
        if not is_onnx(arguments.file):
            raise AttnoptError(f"{arguments.file} is not an .onnx file", hint="pass the file that was exported")
        if arguments.policy != "fuse" or arguments.site is not None:
            raise AttnoptError(
                "--policy and --site do not apply to the comparison with a file",
                hint="leave the file out to see what a policy changes",
            )
        given = Given.of(arguments, needs_sizes=False)
        require_onnx(given, arguments.model, arguments.file)
        with working(f"loading {arguments.model}"):
            named = resolve(arguments.model, given)
        require_model(arguments.model, named, "it is not what the file was exported from")
        own = given.arrays() if not is_onnx(arguments.model) else {}
        with working(f"comparing {arguments.file}"):
            audit = diff(named.model, arguments.file, named.args, named.kwargs, inputs=own)
    except AttnoptError as error:
        print(f"attnopt: {error}", file=sys.stderr)
        return EXIT_CODES["not compared"]
    show(arguments, audit.to_json(), audit_table(audit))
    return audit.exit_code
