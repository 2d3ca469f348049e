"""What a machine may lack.  A compiler that is there and fails is no reason to skip a test."""

from __future__ import annotations

import pytest

from attnopt.backends import native

HAS_COMPILER = native.compiler() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
