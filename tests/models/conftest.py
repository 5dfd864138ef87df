"""Models and inputs of these tests are drawn from the global generator, anew in every run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed(gen: torch.Generator) -> None:
    torch.manual_seed(gen.initial_seed())
