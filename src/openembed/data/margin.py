"""The positive-aware rule that tells a hard negative from a likely false negative (NV-Retriever, arXiv 2407.15831)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config


class MarginConfig(Config):
    """A negative is kept when its teacher score is below a ceiling set by the query's lowest-scored positive.

    ``percent``: ceiling = positive · value (TopK-PercPos, NV-Embed v2 uses 0.95); ``margin``: positive - value
    (TopK-MarginPos); ``absolute``: value; ``none``: no ceiling. A percentage of a score that is not positive is no
    ceiling below it, so then ``positive - fallback_margin`` is used.
    """

    kind: Literal["percent", "margin", "absolute", "none"] = "percent"
    value: float = Field(default=0.95, allow_inf_nan=False)
    fallback_margin: float = Field(default=0.05, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _a_share(self) -> MarginConfig:
        if self.kind == "percent" and not 0 < self.value <= 2:
            raise ValueError(f"value of filter percent is a share of the positive's score, such as 0.95; got {self.value:g}")
        return self

    def ceiling(self, positive_scores_Q: np.ndarray) -> np.ndarray:
        """Returns the score at or above which a negative is discarded, for each query's lowest positive score (Q,).

        An unknown (NaN) positive score gives no ceiling (infinity), except for ``absolute``.
        """
        positives_Q = np.asarray(positive_scores_Q, dtype=np.float64)
        if self.kind == "none":
            return np.full(positives_Q.shape, np.inf)
        if self.kind == "absolute":
            return np.full(positives_Q.shape, self.value)
        if self.kind == "margin":
            ceiling_Q = positives_Q - self.value
        else:
            ceiling_Q = np.where(positives_Q > 0, positives_Q * self.value, positives_Q - self.fallback_margin)
        return np.where(np.isnan(positives_Q), np.inf, ceiling_Q)
