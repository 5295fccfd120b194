"""What the tests of the multi-vector index search: documents and queries around a few directions, everyone eligible."""

import numpy as np
import pytest
from token_paths import COUNT, WIDTH, clustered


@pytest.fixture(scope="module")
def documents():
    """``COUNT`` documents of up to 20 tokens."""
    return clustered(np.random.default_rng(0), COUNT, WIDTH)


@pytest.fixture(scope="module")
def queries():
    """Twelve queries of up to 40 tokens."""
    return clustered(np.random.default_rng(0), 12, WIDTH, longest=40)


@pytest.fixture(scope="module")
def everyone():
    """A mask that leaves no document out."""
    return np.ones(COUNT, dtype=bool)
