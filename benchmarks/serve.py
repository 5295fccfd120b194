"""Serving under load: throughput against offline encoding, latency by text length, beside infinity on the same model.

Closed-loop clients in a process of their own (benchmarks/load.py) send one text a request, mixed lengths: short questions,
answers, paragraphs, chunks that fill the limit. Rounds alternate: offline ``encode`` of the same texts, our server, infinity
where its program is given. All run on the cores that this process may use, so the client's share is inside every figure.

    python benchmarks/serve.py --data ../shared/data --model minilm --rounds 5 --json out.json
    python benchmarks/serve.py --data ../shared/data --model minilm --infinity /path/to/infinity_emb
    python benchmarks/serve.py --data ../shared/data --model openembed-nano --soak 600

``--soak SECONDS`` runs our server under load of valid and invalid requests and records its memory over time.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from encode import minilm, sample_texts

import openembed

HERE = Path(__file__).parent
BUCKETS = ((1, 16), (17, 64), (65, 128), (129, 10_000))
GAP_S = 0.5


def start_ours(model, port, extra):
    command = [sys.executable, "-m", "openembed", "serve", str(model), "--port", str(port), *extra]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def start_infinity(program, model, port, extra):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    environment.pop("PYTHONPATH", None)
    arguments = ["v2", "--model-id", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *extra]
    return subprocess.Popen([program, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait(url, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer in {seconds} s")


def load(bodies, url, clients, folder):
    path = Path(folder) / "bodies.json"
    path.write_text(json.dumps(bodies))
    command = [sys.executable, str(HERE / "load.py"), str(path), "--url", url, "--clients", str(clients)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def offline(encoder, texts):
    start = time.perf_counter()
    encoder.encode(texts)
    return time.perf_counter() - start


def milliseconds(values, share):
    return round(float(np.percentile(values, share)) * 1000, 1)


def summary(runs, lengths):
    """Medians over rounds; percentiles over all requests of all rounds."""
    latencies = np.array([run["latencies"] for run in runs])
    tokens = int(lengths.sum())
    rows = {}
    for low, high in BUCKETS:
        inside = latencies[:, (lengths >= low) & (lengths <= high)].ravel()
        if len(inside):
            rows[f"{low}-{high if high < 10_000 else ''}"] = {
                "requests": len(inside),
                "p50_ms": milliseconds(inside, 50),
                "p99_ms": milliseconds(inside, 99),
            }
    return {
        "tokens_per_s": tokens / statistics.median(run["seconds"] for run in runs),
        "texts_per_s": len(lengths) / statistics.median(run["seconds"] for run in runs),
        "p50_ms": milliseconds(latencies, 50),
        "p99_ms": milliseconds(latencies, 99),
        "by_tokens": rows,
        "client_cpu_share": statistics.median(run["client_cpu_s"] / run["seconds"] for run in runs),
        "failed": sum(status != 200 for run in runs for status in run["statuses"]),
    }


def bodies_for(texts, model, encoding):
    return [{"model": model, "input": [text], "encoding_format": encoding} for text in texts]


def compare(options, model, texts, folder):
    encoder = openembed.load(model, device="cpu")
    lengths = encoder.tokenize(texts).lengths
    servers = {"openembed": (start_ours(model, options.port, options.ours), f"http://127.0.0.1:{options.port}/v1/embeddings")}
    if options.infinity:
        process = start_infinity(options.infinity, model, options.port + 1, options.theirs)
        servers["infinity"] = (process, f"http://127.0.0.1:{options.port + 1}/embeddings")
    try:
        for name, (_, url) in servers.items():
            wait(url.removesuffix("/v1/embeddings").removesuffix("/embeddings") + "/health")
            load(bodies_for(texts[:64], options.name or str(model), options.encoding), url, options.clients, folder)
            print(f"{name} is warm", flush=True)
        offline(encoder, texts[:64])
        runs, alone = {name: [] for name in servers}, []
        for number in range(options.rounds):
            alone.append(offline(encoder, texts))
            names = list(servers) if number % 2 == 0 else list(reversed(servers))
            for name in names:
                time.sleep(GAP_S)
                asked = "openembed" if name == "openembed" else options.name or Path(model).name
                bodies = bodies_for(texts, asked if name != "openembed" else None, options.encoding)
                runs[name].append(load(bodies, servers[name][1], options.clients, folder))
            print(f"round {number + 1}: offline {alone[-1]:.2f} s, {times(runs)}", flush=True)
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    return report(lengths, alone, runs)


def times(runs):
    return ", ".join(f"{name} {rows[-1]['seconds']:.2f} s" for name, rows in runs.items())


def report(lengths, alone, runs):
    found = {
        "texts": len(lengths),
        "tokens": int(lengths.sum()),
        "offline_tokens_per_s": lengths.sum() / statistics.median(alone),
    }
    found |= {name: summary(rows, lengths) for name, rows in runs.items()}
    shares = [a / run["seconds"] for a, run in zip(alone, runs["openembed"], strict=True)]
    found["share_of_offline"] = {"median": statistics.median(shares), "range": [min(shares), max(shares)]}
    if "infinity" in runs:
        pairs = zip(runs["infinity"], runs["openembed"], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        found["throughput_over_infinity"] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return found


def spoiled(clock, text):
    """A request body that is wrong in one of many ways, or a valid one."""
    kinds = [
        {"input": text},
        {"input": [text] * clock.randint(1, 8)},
        {"input": text, "encoding_format": "base64"},
        {"input": []},
        {"input": [1, "a"]},
        {"input": text, "dimensions": -1},
        {"input": text, "model": "../../etc/passwd"},
        {"input": text * 50, "truncate": False},
        {"nonsense": text * 10},
    ]
    return clock.choice(kinds)


def soak(options, model, texts, folder):
    """Memory of our server over time under load that never pauses for long."""
    server = start_ours(model, options.port, options.ours)
    base, clock, rows = f"http://127.0.0.1:{options.port}", random.Random(0), []
    try:
        wait(f"{base}/health")
        start, sent, failed = time.monotonic(), 0, 0
        while time.monotonic() - start < options.soak:
            bodies = [spoiled(clock, clock.choice(texts)) for _ in range(500)]
            run = load(bodies, f"{base}/v1/embeddings", options.clients, folder)
            sent += len(bodies)
            failed += sum(status >= 500 or status == 0 for status in run["statuses"])
            resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            rows.append({"s": round(time.monotonic() - start, 1), "requests": sent, "resident_mb": round(resident / 1e6, 1)})
        after = [row["resident_mb"] for row in rows if row["s"] > options.soak * 0.2] or [row["resident_mb"] for row in rows]
        return {
            "requests": sent,
            "failed_5xx": failed,
            "resident_mb_first_fifth_max": max(row["resident_mb"] for row in rows if row["s"] <= options.soak * 0.2),
            "resident_mb_after_max": max(after),
            "resident_mb_end": rows[-1]["resident_mb"],
            "over_time": rows[:: max(1, len(rows) // 30)],
        }
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="minilm", help="minilm, openembed-nano or a folder")
    parser.add_argument("--infinity", help="the program infinity_emb")
    parser.add_argument("--name", help="the model's name in requests to infinity (default: the folder's)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=2.0, help="texts: 280 times this")
    parser.add_argument("--encoding", default="base64", choices=("base64", "float"))
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--ours", default="", type=str.split, help="further options of openembed serve, in one string")
    parser.add_argument("--theirs", default="--engine torch", type=str.split, help="further options of infinity_emb")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = minilm() if options.model == "minilm" else options.model
    texts = sample_texts(options.data, options.scale)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        found = (soak if options.soak else compare)(options, model, texts, folder)
    found = {"model": options.model, "clients": options.clients, "cores": cores, "load_average": os.getloadavg()[0], **found}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
