"""What every test run needs: one thread, fixed seeds, no network, and a torchvision that imports beside a CPU build of torch."""

from __future__ import annotations

import os

os.environ["ATTNOPT_DEBUG"] = "1"  # a fault of attnopt fails the test, where a user gets a refusal
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def _stub_torchvision() -> torch.library.Library | None:
    """timm imports torchvision, whose usual wheel is a CUDA build: its two operators have to exist before that import."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return None
    version = Path(spec.origin).with_name("version.py")
    if version.is_file() and "cuda = None" in version.read_text(encoding="utf-8"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _stub_torchvision()


def pytest_configure(config: pytest.Config) -> None:
    """A machine without a C++ compiler says so at every attention; tests that need the kernel are skipped there."""
    from needs import HAS_COMPILER

    if not HAS_COMPILER:
        told = "ignore:attention runs without its compiled kernel:attnopt.AttnoptWarning"
        config.addinivalue_line("filterwarnings", told)


def pytest_collection_finish() -> None:
    """What all test files import lives as long as the process: a collection of garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as torch's older exporter wrote it."""
    from older_onnx import written

    return written(tmp_path_factory.mktemp("onnx") / "old.onnx")


@pytest.fixture(scope="module")
def one_capture() -> Iterator[None]:
    """A test file asks for this where its tests optimize one model over and over; see ``captures``."""
    from captures import captured_once

    with captured_once():
        yield


@pytest.fixture(scope="session")
def one_torchlib() -> Iterator[None]:
    """torch reads the source of its 500 ONNX functions anew at every export; here once for all of them."""
    from unittest import mock

    from torch.onnx._internal.exporter._registration import ONNXRegistry

    known: dict[object, ONNXRegistry] = {}
    real = ONNXRegistry.from_torchlib

    def copied(**options: int) -> ONNXRegistry:
        key = tuple(options.items())
        if key not in known:
            known[key] = real(**options)
        made = ONNXRegistry()
        made._opset_version = known[key].opset_version
        made.functions = {name: [*functions] for name, functions in known[key].functions.items()}
        return made

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(copied)):
        yield


# The same examples at every `make test`, new ones at every `make fuzz`.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)  # no test is timed
if not os.environ.get("ATTNOPT_EXAMPLES"):
    hypothesis.settings.load_profile("reproducible")
