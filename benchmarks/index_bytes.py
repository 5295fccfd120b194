"""What a document takes on the disk in a store, by system: bytes of the store's files less those of a store of words alone.

The models are those of a finished sweep (first seed, int8, 128 tokens unless it reads a text twice), the documents those of one
BEIR folder.

    python benchmarks/index_bytes.py --runs runs/systems --data DATA/scifact --json bytes.json
"""

import argparse
import json
import tempfile
from pathlib import Path

from system_latency import SYSTEMS

import openembed
from openembed.data.readers import read_beir
from openembed.index.store import Store, describe_model


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    corpus, _, _ = read_beir(args.data)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Store.create(Path(folder) / "bm25", corpus)
        words = size(Path(folder) / "bm25")
        found["bm25"] = {"with text": words / len(corpus)}
        for variant, stage in SYSTEMS.items():
            model = args.runs / "runs" / variant / f"seed-{args.seed}" / stage / "model"
            if model.is_dir():
                encoder = openembed.load(model, dtype="int8")
                if encoder.config.tokenizer.repeat is None:
                    encoder.config = encoder.config.model_copy(update={"max_length": min(128, encoder.config.max_length)})
                place = Path(folder) / variant
                Store.create(place, model=describe_model(str(model), encoder)).add(corpus, encoder)
                found[variant] = {"vectors alone": (size(place) - words) / len(corpus), "with text": size(place) / len(corpus)}
                print(variant, found[variant], flush=True)
    report = {"documents": len(corpus), "data": args.data.name, "seed": args.seed, "bytes a document": found}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
