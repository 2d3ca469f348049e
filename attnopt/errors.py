"""The exceptions of attnopt.  Each message says what is wrong and what to do."""

from __future__ import annotations


class AttnoptError(Exception):
    """Base class of all expected errors.

    ``message``: what happened; ``hint``: what the user can do; ``site``: the attention concerned, if any.
    """

    def __init__(self, message: str, *, hint: str | None = None, site: str | None = None) -> None:
        self.message, self.hint, self.site = message, hint, site
        super().__init__(self._text())

    def _text(self) -> str:
        where = f"{self.site}: " if self.site else ""
        remedy = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.message}{remedy}"


class CaptureError(AttnoptError):
    """The model could not be captured, or a call does not fit the captured graph."""


class PolicyError(AttnoptError):
    """The policy is malformed, names an unknown pass, option or site, or asks for something impossible."""


class RewriteError(AttnoptError):
    """A pass failed on a site that it had accepted, or ``strict=True`` met a refusal."""


class VerificationError(AttnoptError):
    """The rewritten model does not compute what its specs say, or exceeds the tolerance."""


class ConversionError(AttnoptError):
    """The class of the model cannot represent the result of the policy; ``optimize`` can."""


class ArchiveError(AttnoptError):
    """A saved model could not be written or read."""


class ExportError(AttnoptError):
    """The ONNX export failed, or ONNX Runtime disagreed with torch.  No file is left behind."""


class CalibrationError(AttnoptError):
    """Calibration data is missing, malformed or insufficient."""


class PluginError(AttnoptError):
    """A plugin could not be loaded or registered, or violates the contract of its kind."""


class SearchError(AttnoptError):
    """The objective of a search failed.  ``partial``: the result so far."""

    def __init__(self, message: str, *, hint: str | None = None, partial: object = None) -> None:
        self.partial = partial
        super().__init__(message, hint=hint)


class DistributedError(AttnoptError):
    """Processes that work together lack a group, differ in what they were given, or one of them failed."""


class PeerError(DistributedError):
    """Another process failed, and every process knows: none of them goes on."""


class AttnoptWarning(UserWarning):
    """A non-fatal finding that the user should know: no attention found, a policy without effect."""
