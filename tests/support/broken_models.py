"""A module whose import fails with an error that names no module."""

raise ModuleNotFoundError("half an install")
