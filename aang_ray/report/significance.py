"""Paired t-test over matching seeds (semantics section 5)."""

from __future__ import annotations

import math

from aang_ray.report.select import Configuration


def paired_p_value(configuration: Configuration, baseline: Configuration) -> float | None:
    """Two-sided p-value of `mean(test difference) = 0` over the seeds that both have.

    With differences d_i over m common seeds, t = mean(d) / (sd(d) / sqrt(m)) with m - 1 degrees of freedom. None with
    fewer than two common seeds, or where all differences are equal and t is not defined.
    """
    ours = dict(zip(configuration.seeds, configuration.test.values, strict=True))
    theirs = dict(zip(baseline.seeds, baseline.test.values, strict=True))
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in common]
    if len(common) < 2 or max(differences) - min(differences) <= 1e-12:
        return None
    # Imported where it is needed: it takes longer to import than the rest of a table to make.
    from scipy import stats

    p = float(stats.ttest_rel([ours[seed] for seed in common], [theirs[seed] for seed in common]).pvalue)
    return None if math.isnan(p) else p
