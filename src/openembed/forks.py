"""Encoding in forked processes (multiprocessing's ``fork``, prefork servers, data loaders)."""

from __future__ import annotations

import os
from functools import cache


@cache
def one_thread_in_forks() -> None:
    """Makes every process forked from now on compute with one thread; whoever loads a model calls it.

    OpenMP's threads, which torch and our kernels share, do not live on in a forked process, and it would wait for them for
    ever. ``torch.set_num_threads`` of more than one in the child brings that back.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
