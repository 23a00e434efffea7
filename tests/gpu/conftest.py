"""Kernels are interpreted where there is no GPU; the variable is read when Triton is imported."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
