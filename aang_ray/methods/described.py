"""Rows for the store of methods whose weights are no softmax of factors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aang_ray.methods.base import Sampled, named_weights
from aang_ray.store.rows import WeightRow


def weight_row(sampled: Sampled, names: Sequence[str], weights_m: Tensor) -> WeightRow:
    """The weights of the end task and of the sampled objectives, [1 + n]; waits for the device.

    In the row the end task's share of the sum, and the objectives' shares of theirs (0 where the sum is 0); the
    weights as they are under `health`, as `weight/<name>`: they may be negative, and need not sum to 1.
    """
    weights = weights_m.tolist()
    total, objectives = sum(weights), sum(weights[1:])
    shares = [weight / objectives if objectives else 0.0 for weight in weights[1:]]
    health = {f"weight/{name}": weight for name, weight in named_weights(sampled, names, weights[1:]).items()}
    return WeightRow(
        step=sampled.step + 1,
        end_task_weight=weights[0] / total if total else 0.0,
        weights=named_weights(sampled, names, shares),
        factors={},
        health={"weight/end_task": weights[0], **health},
    )
