"""Forces one of the ways in which dense search finds its candidates, so that small inputs go through all of them."""

from contextlib import contextmanager

import pytest

from openembed.index import codes, dense
from openembed.index.native import scan_library

PATHS = ["products", *(["codes", "threads", "no room"] if scan_library() else [])]
"""``no room``: so few candidates are held that most queries fall back to products."""


@contextmanager
def forced(path, block=dense.BLOCK):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK", block)
        patch.setattr(dense, "QUERIES", 7)
        patch.setattr(dense, "DIRECT", 0)
        patch.setattr(dense, "WORTH_CODING", 0)
        patch.setattr(dense, "capacity", lambda _k: 1)
        if path == "products":
            patch.setattr(dense, "scan_library", lambda: None)
        if path == "threads":
            patch.setattr(codes, "THREADED", 1)
            patch.setattr(codes, "threads", lambda: 3)
        if path == "no room":
            patch.setattr(codes, "capacity", lambda k: k + 24)
        yield
