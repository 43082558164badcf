"""Fixtures that name the folders with models and data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A test is judged by what comes out, on a busy or an emulated machine too.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Before any test imports ONNX Runtime: tests use no network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The sample models of this repository."""
    return Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Models and images for tests marked ``data``; they skip where there are none."""
    folder = os.environ.get("ATTNROUND_DATA")
    if not folder:
        pytest.skip("ATTNROUND_DATA does not name the folder with test models and images")
    return Path(folder)
