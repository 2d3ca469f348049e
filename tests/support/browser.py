"""Pages in headless Chromium, and HTML that closes what it opens."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from places import ROOT

from attnopt.render.page import framed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"  # `npm install --no-save axe-core` puts it there
AXE = _AXE if _AXE.is_file() else None


def seen(page: str, folder: Path, width: int, dark: bool, look: str) -> dict[str, Any]:
    """What headless Chromium makes of the page in a frame of this width: ``look``, a script, leaves it as JSON in the title of
    the outer page."""
    outer = folder / "outer.html"
    frame = framed(page.replace("</body>", look + "</body>")).replace("width:100%", f"width:{width}px")
    outer.write_text(f"<!DOCTYPE html><title>nothing</title><body>{frame}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
    if dark:
        options.append("--blink-settings=preferredColorScheme=0")
    command = [str(CHROMIUM), *options, "--virtual-time-budget=2000", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    return dict(json.loads(html.unescape(title)))


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("br", "wbr", "meta", "base"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def is_balanced(fragment: str) -> bool:
    parser = _Balanced()
    parser.feed(fragment)
    parser.close()
    return not parser.open
