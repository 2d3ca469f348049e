"""``--data`` of a search: texts for a tokenizer, saved calibration data, or batches from a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from torch import nn

    from attnopt.capture.calibration import Calibration

BATCH, LONGEST = 16, 512  # texts of a batch, and tokens of a text
HELP = (
    "calibration data: a .txt file with one text a line (and --tokenizer), a .safetensors file that Calibration.save wrote, "
    "or package.module:function, which returns batches"
)


def calibration_of(name: str, tokenizer: str | None, model: nn.Module) -> Iterable[Any] | Calibration:
    """Raises AttnoptError."""
    from attnopt.capture.calibration import Calibration
    from attnopt.cli.load_model import returned_batches

    path = Path(name)
    if path.suffix == ".safetensors":
        return Calibration.load(path)
    if path.suffix == ".txt":
        return list(_tokens(path, tokenizer, model))
    if ":" not in name:
        raise AttnoptError(f"--data {name} is neither a file of data nor a function", hint=HELP)
    return returned_batches(name)


def _tokens(path: Path, tokenizer: str | None, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Texts of nearly one length together, as the keyword arguments that the model takes."""
    if tokenizer is None:
        raise AttnoptError(
            f"--data {path} holds texts, and there is no tokenizer",
            hint="add --tokenizer, a folder or a name of transformers",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise AttnoptError(f"--data {path} cannot be read: {error}") from error
    texts = sorted((line.strip() for line in lines if line.strip()), key=len)
    if not texts:
        raise AttnoptError(f"--data {path} holds no text", hint="one text a line")
    encode = _tokenizer(tokenizer)
    taken = inspect.signature(model.forward).parameters
    for i in range(0, len(texts), BATCH):
        made = encode(texts[i : i + BATCH], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        yield {key: value for key, value in made.items() if key in taken}


def _tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise AttnoptError("--tokenizer needs transformers", hint="pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise AttnoptError(f"--tokenizer {name}: {type(error).__name__}: {str(error)[:200]}") from error
