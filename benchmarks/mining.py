"""Speed and memory of mining: random unit vectors for as many documents and queries as asked, through the whole pipeline.

The encoder is a random generator, so what is measured is mining: writing documents, journalled vectors, blocked products with
the running top, exact scores, rows. ``product_gflops`` is this machine's matrix product (float32, 1,024 × width × 4,096)
measured in the same process, in processor time; ``share_of_product_rate`` is the processor time that the products alone would
take at that rate over what the search took. A resumed run counts what it searched itself. ``anonymous`` is memory that cannot
be dropped, sampled ten times a second; ``resident`` counts pages of mapped files too.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/mining.py --documents 1000000 --queries 10000 --json out.json
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from openembed.data.mine import MineConfig, mine_folder
from openembed.data.teachers import EncoderTeacher
from openembed.records import Document, Example, Query


class RandomVectors:
    """Unit vectors drawn anew for every chunk of texts, the same for the same first text."""

    device, dtype = "cpu", "float32"

    def __init__(self, width):
        self.width, self.seconds = width, 0.0
        self.fingerprint = hashlib.sha256(f"random {width}".encode()).hexdigest()

    def encode(self, texts, **_options):
        start = time.perf_counter()
        seed = int.from_bytes(hashlib.sha256(texts[0].encode()).digest()[:8], "little")
        values_ND = np.random.default_rng(seed).standard_normal((len(texts), self.width), dtype=np.float32)
        values_ND /= np.linalg.norm(values_ND, axis=1, keepdims=True)
        self.seconds += time.perf_counter() - start
        return values_ND

    def query_prompt(self, task=None, instruction=None):
        return ""

    document_prompt = query_prompt


class Timed(EncoderTeacher):
    """The teacher, with its searches timed."""

    seconds, wall, queries = 0.0, 0.0, 0

    def search(self, queries, *arguments, **options):
        start, wall = time.process_time(), time.perf_counter()
        try:
            return super().search(queries, *arguments, **options)
        finally:
            Timed.seconds += time.process_time() - start
            Timed.wall += time.perf_counter() - wall
            Timed.queries += len(queries)


def product_rate(width):
    """Returns float32 operations a second of one block's product."""
    random = np.random.default_rng(0)
    queries_QD = random.standard_normal((1024, width), dtype=np.float32)
    documents_ND = random.standard_normal((4096, width), dtype=np.float32)
    times = []
    for _ in range(15):
        start = time.process_time()
        queries_QD @ documents_ND.T
        times.append(time.process_time() - start)
    return 2 * 1024 * 4096 * width / statistics.median(times)


def watch(peak, stop):
    while not stop.wait(0.1):
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], anonymous / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--pool", type=int, default=100)
    parser.add_argument("--out", type=Path, help="Folder to work in, to resume an interrupted run.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import openembed.data.teachers as teachers

    teachers.EncoderTeacher = Timed
    examples = [Example(Query(str(n), f"query {n}"), (Document(str(n), f"text {n}"),), (), "s") for n in range(options.queries)]
    documents = (Document(str(n), f"text {n}") for n in range(options.documents))
    encoder, rate = RandomVectors(options.width), product_rate(options.width)
    before, peak, stop = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, [0.0], threading.Event()
    threading.Thread(target=watch, args=(peak, stop), daemon=True).start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = MineConfig(keep=7, pool=options.pool, filter={"kind": "none"})
        audit = mine_folder(examples, documents, options.out or folder, config, encoder).audit
    total = time.perf_counter() - start
    stop.set()
    ideal = 2.0 * Timed.queries * options.documents * options.width / rate
    report = {
        "documents": options.documents, "queries": options.queries, "width": options.width, "negatives": audit["negatives"],
        "seconds": round(total, 1), "queries_searched": Timed.queries, "seconds_of_search": round(Timed.wall, 1),
        "processor_seconds_of_search": round(Timed.seconds, 1), "seconds_drawing": round(encoder.seconds, 1),
        "queries_per_processor_second_of_search": round(Timed.queries / max(Timed.seconds, 1e-9), 1),
        "product_gflops": round(rate / 1e9, 1), "share_of_product_rate": round(ideal / max(Timed.seconds, 1e-9), 3),
        "resident_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "resident_before_mb": round(before), "anonymous_peak_mb": round(peak[0]),
        "threads": os.environ.get("OMP_NUM_THREADS"), "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
