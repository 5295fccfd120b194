"""A process forked after a model has run with several threads encodes too, and waits for no thread of its parent."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

SECONDS = 60
TEXTS = ["a cat sleeps in the garden " * 10] * 40


def encode_in_a_fork(model: str) -> None:
    """Run in a process of its own: encodes with two threads, then in a child of multiprocessing's."""
    import torch

    import openembed

    torch.set_num_threads(2)
    encoder = openembed.load(model)
    expected = encoder.encode(TEXTS)
    torch.randn(2_000_000).exp()  # torch's own threads have run too

    def same() -> bool:
        whole = bool(torch.ones(2_000_000).exp().sum() > 0)
        return whole and np.allclose(encoder.encode(TEXTS), expected, atol=1e-6)

    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0 if same() else "other vectors"))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        raise SystemExit("the child hangs")
    assert child.exitcode == 0
    assert torch.get_num_threads() == 2  # the parent keeps its own


@pytest.mark.parametrize("kernels", ["", "off"])
@pytest.mark.parametrize("model", ["nano", "minilm"])
def test_a_forked_process_encodes(model, kernels, request):
    reference = "openembed-nano" if model == "nano" else str(request.getfixturevalue("minilm_dir"))
    done = subprocess.run(
        [sys.executable, __file__, reference],
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENEMBED_KERNELS": kernels},
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    encode_in_a_fork(sys.argv[1])
