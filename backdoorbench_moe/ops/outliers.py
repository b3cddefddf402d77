"""Outliers among a few numbers, such as one for each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# For a normal distribution these times the median, or the mean, absolute deviation are the standard deviation.
MEDIAN_SCALE, MEAN_SCALE = 1.4826, 1.253314


def anomaly_indices(values: Sequence[float]) -> np.ndarray:
    """Compute how many robust standard deviations each value lies below the median.

    The median of an even count is the mean of the two middle values. The standard deviation is estimated as 1.4826
    times the median absolute deviation (MAD). If more than half of the values are equal, the MAD is 0; 1.253314 times
    the mean absolute deviation from the median takes its place, as in Iglewicz and Hoaglin. If all values are equal,
    all indices are 0.

    Args:
        values: Finite numbers, at least one.

    Returns:
        (n,) float64, positive for values below the median. The anomaly index of Neural Cleanse is the absolute value.

    Raises:
        ValueError: There are no values, or one of them is not finite.

    Source:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV-B; Iglewicz and Hoaglin, "How to Detect and Handle
        Outliers", 1993.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"anomaly_indices: expected finite numbers, at least one, got {list(values)}")
    below = np.median(numbers) - numbers
    apart = np.abs(below)
    scale = MEDIAN_SCALE * np.median(apart) or MEAN_SCALE * np.mean(apart)
    return below / scale if scale else below
