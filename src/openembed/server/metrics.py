"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5)


class Metrics:
    """Counters, histograms and gauges; ``text`` is what ``/metrics`` serves."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        made = {"registry": self.registry, "namespace": "openembed"}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **made)
        self.seconds = Histogram("request_seconds", "From the first byte to the answer.", ["route"], buckets=SECONDS, **made)
        self.tokens = Counter("tokens", "Tokens encoded.", ["model"], **made)
        self.texts = Counter("texts", "Texts encoded.", ["model"], **made)
        self.batches = Histogram("batch_seconds", "Time of a micro-batch.", ["model"], buckets=SECONDS, **made)
        self.fill = Histogram("batch_fill", "Tokens of a micro-batch over its budget.", ["model"], buckets=SHARES, **made)
        self.failures = Counter("batch_failures", "Micro-batches that failed.", ["model"], **made)
        self.dropped = Counter("dropped_requests", "Requests given up before their answer.", ["reason"], **made)
        self._gauge("resident_bytes", "Memory of the process.", resident_bytes)
        self._gauge("gpu_bytes", "Memory allocated on the GPU.", gpu_bytes)

    def watch(self, name: str, about: str, read: Callable[[], float], labels: dict[str, str]) -> None:
        """Adds a gauge, read when it is asked for; gauges of one name share their labels' keys."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = Gauge(name, about, list(labels), registry=self.registry, namespace="openembed")
            self._gauges[name] = gauge
        gauge.labels(**labels).set_function(read)

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(name, about, registry=self.registry, namespace="openembed").set_function(read)


def resident_bytes() -> float:
    """Returns the resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def gpu_bytes() -> float:
    """Returns the memory allocated on all GPUs; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return float(sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count())))
