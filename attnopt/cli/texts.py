"""``--data`` that is a file of texts, and the tokenizer that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnopt.errors import AttnoptError

LONGEST = 512  # tokens of a text


def encoded(path: Path, tokenizer: str | None, size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of ``size`` texts of nearly one length, as all that the tokenizer says of them.  Raises AttnoptError."""
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
    for i in range(0, len(texts), size):
        yield encode(texts[i : i + size], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")


def _tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise AttnoptError("--tokenizer needs transformers", hint="pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise AttnoptError(f"--tokenizer {name}: {type(error).__name__}: {str(error)[:200]}") from error
