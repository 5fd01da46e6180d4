"""The methods that TorchJD computes, apart from the others: with it comes cvxpy, which takes seconds to import."""

from __future__ import annotations

from aang_ray.config.methods import AggregationConfig, ScalarizationConfig
from aang_ray.config.methods.aggregations import GraddropConfig, GramSection
from aang_ray.config.methods.scalarizations import DwaConfig, RandomConfig, UncertaintyConfig
from aang_ray.methods.aggregation import GramAggregation
from aang_ray.methods.base import Method
from aang_ray.methods.dwa import DynamicWeightAverage
from aang_ray.methods.graddrop import GradDrop
from aang_ray.methods.scalarization import RandomWeights
from aang_ray.methods.uncertainty import Uncertainty
from aang_ray.methods.weighting import Weighting


def make_torchjd_method(config: AggregationConfig | ScalarizationConfig, weighting: Weighting, seed: int) -> Method:
    """The method that a configuration names; `weighting` holds static multitask's weights."""
    match config:
        case GramSection():
            return GramAggregation(weighting, config, seed)
        case GraddropConfig():
            return GradDrop(weighting, config, seed)
        case RandomConfig():
            return RandomWeights(weighting, seed)
        case UncertaintyConfig():
            return Uncertainty(weighting, config.lr)
        case DwaConfig():
            return DynamicWeightAverage(weighting, config)
