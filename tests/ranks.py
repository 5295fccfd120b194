"""Starts several gloo processes on this machine, as torchrun would, and never waits for them forever."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import openembed

PROGRAMS = Path(__file__).with_name("rank_programs.py")


def environment(rank, size, port):
    path = os.pathsep.join([str(PROGRAMS.parent), str(Path(openembed.__file__).parents[1])])
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{k: str(v) for k, v in ranks.items()}, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command, size=2, seconds=120):
    """Runs ``command`` as ``size`` ranks; returns (exit code, output) a rank. All are dead when this returns."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
        raise AssertionError("ranks still ran after " + f"{seconds} s:\n" + "\n---\n".join(outputs)) from None
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def program(name, *arguments, size=2, seconds=120):
    """Runs a function of ``rank_programs`` on all ranks; fails with their output when one fails."""
    results = launch([PROGRAMS, name, *arguments], size, seconds)
    assert all(code == 0 for code, _ in results), "\n---\n".join(output for _, output in results)
    return results
