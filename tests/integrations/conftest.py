"""Megatron's functions run as they are written: compiling them would take longer than all else here."""

import pytest
import torch


@pytest.fixture(autouse=True)
def not_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield
