"""Every error that attnopt raises on purpose.  Each names what it is about and what to do next."""

from __future__ import annotations


class AttnoptError(Exception):
    """Base of every deliberate error.

    ``message`` says what happened, ``hint`` what the user can do about it, ``site`` which attention it is about (if any).
    """

    def __init__(self, message: str, *, hint: str | None = None, site: str | None = None) -> None:
        self.message, self.hint, self.site = message, hint, site
        super().__init__(self._text())

    def _text(self) -> str:
        where = f"{self.site}: " if self.site else ""
        remedy = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{remedy}"


class CaptureError(AttnoptError):
    """The model could not be turned into a graph, or was called in a way that its graph does not cover."""


class PolicyError(AttnoptError):
    """The policy is malformed, names an unknown pass, option or site, or asks for something impossible."""


class RewriteError(AttnoptError):
    """A pass could not be applied to a site that it had accepted, or ``strict=True`` met a refusal."""


class VerificationError(AttnoptError):
    """A rewritten model does not compute what it was meant to compute, or exceeds the user's tolerance."""


class ConversionError(AttnoptError):
    """What the policy asks for cannot be held by a model of the user's class; ``optimize`` can do it."""


class ArchiveError(AttnoptError):
    """A saved model could not be written or read."""


class ExportError(AttnoptError):
    """The ONNX export failed, or ONNX Runtime disagreed with torch.  No file is left behind."""


class CalibrationError(AttnoptError):
    """Calibration data is missing, of the wrong form, or too little."""


class PluginError(AttnoptError):
    """A plugin could not be loaded or registered, or does not do what its kind has to do."""


class AttnoptWarning(UserWarning):
    """Something that the user should hear of but that stops nothing: no attention found, a policy that changes nothing."""
