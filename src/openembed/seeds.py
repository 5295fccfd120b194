"""Random generators as pure functions of (seed, purpose): nothing random is remembered, so nothing must be restored."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed that depends on every part of ``(seed, *purpose)`` and is the same on every machine."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns a counter-based generator for one purpose, such as ``generator(seed, "rows", step)``."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))
