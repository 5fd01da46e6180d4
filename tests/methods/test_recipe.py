"""The method that docs/methods/README.md adds, as it is printed there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aang_ray.config import methods as settings
from tests.methods.problem import Problem, sampled, weighting

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "README.md"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the second block of code, with the settings of the first in config/methods.py."""
    section, source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = dict(vars(settings))
    exec(section, names)
    monkeypatch.setattr(settings, "LossRankConfig", names["LossRankConfig"], raising=False)
    module = ModuleType("loss_rank")
    monkeypatch.setitem(sys.modules, "loss_rank", module)
    exec(source, vars(module))
    return module


def test_the_method_of_the_docs_weighs_losses_by_their_rank(blocks: ModuleType) -> None:
    config = settings.LossRankConfig()  # type: ignore[attr-defined]  # set by the fixture
    assert config.implementation == "loss_rank:LossRank"
    method = blocks.LossRank(weighting(), config)
    step = sampled(0, 2, 3)
    assert method.request(step).coefficients_S.tolist() == [0.0, 0.25, 0.25, 0.25, 0.25], "no loss has been seen"
    answer = Problem.random(5, 0).answer(method.request(step))
    answer.losses_S.copy_(torch.tensor([9.0, 1.0, 4.0, 2.0, 3.0]))
    method.observe(step, answer)
    assert method.request(step).coefficients_S.tolist() == pytest.approx([0.0, 0.1, 0.4, 0.2, 0.3])
    # Objective 1 has not been seen: its loss counts as 0, and its rank is the lowest.
    assert method.request(sampled(1, 2)).coefficients_S.tolist() == pytest.approx([0.0, 1 / 3, 1 / 6, 1 / 2])
    again = blocks.LossRank(weighting(), config)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.request(step).coefficients_S, method.request(step).coefficients_S)
    assert sum(method.describe(step).weights.values()) == pytest.approx(1.0)
