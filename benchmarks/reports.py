"""What benchmarks share: taking times, telling where and how they were taken, writing reports."""

import json
import os
import platform
import resource
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

SETTINGS = "OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENEMBED_KERNELS"
"""Variables of the environment that decide how fast things are."""


def clocked(action):
    """What ``action`` gives, and its seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def machine():
    """The processor's name and how many of it this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0]}, {allowed} of {os.cpu_count()} processors"


def command():
    """How this program was called; of absolute paths the last part, since the rest is of this machine alone."""
    given = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    return " ".join([*given, "python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shlex.quote, arguments)])


def environment(*packages):
    """Date, machine, load before (so call it first), command, and versions of Python, of openembed and of these packages."""
    versions = {"python": platform.python_version()}
    for package in ("openembed", "numpy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "command": command(),
        "versions": versions,
    }


def finished(report, out):
    """Writes the report of a benchmark, with the most memory it had, to standard output and to ``out`` where there is one."""
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if out:
        out.write_text(text + "\n")
