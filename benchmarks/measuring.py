"""What benchmarks share: taking times, writing reports."""

import json
import resource
import sys
import time


def clocked(action):
    """What ``action`` gives, and its seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def finished(report, out):
    """Writes the report of a benchmark, with the most memory it had, to standard output and to ``out`` where there is one."""
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if out:
        out.write_text(text + "\n")
