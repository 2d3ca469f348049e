"""The atlas of heads as one HTML page and in notebooks: no network; a script sorts and colours, and everything shows without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.render.atlas_view import AtlasView
from attnopt.render.page import framed, rendered

if TYPE_CHECKING:
    from attnopt.report.atlas import Atlas


def atlas_page(atlas: Atlas) -> str:
    """The whole page.  Everything that comes from the model is escaped."""
    return rendered("atlas.html.j2", atlas=atlas, view=AtlasView(atlas))


def atlas_frame(atlas: Atlas) -> str:
    """The page embedded in another one, such as a notebook."""
    return framed(atlas_page(atlas), "attnopt atlas of heads")
