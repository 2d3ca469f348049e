"""Results that are also one page."""

from __future__ import annotations

import os
from pathlib import Path

from attnopt.base.atomic_files import atomic_write
from attnopt.base.display import shown


class Page:
    """Shown by renderers of the forms "html", embedded in a notebook, and "page": see ``shown_by``."""

    def _repr_html_(self) -> str:
        return shown(self, "html")

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page atomically, and return its path."""
        with atomic_write(path) as temporary:
            temporary.write_text(shown(self, "page"), encoding="utf-8")
        return Path(path)
