"""Changes a store until it is killed; writes a line before each change begins and one once it returned."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from store_fakes import BagOfWords

from openembed.index.store import Store
from openembed.records import Document

store, encoder = Store(sys.argv[1]), BagOfWords(8)
for number in range(int(sys.argv[2]), 1_000_000):
    sys.stdout.write(f"begin {number}\n")
    sys.stdout.flush()
    if number % 5 == 4:
        store.compact()
    elif number % 3 == 2:
        store.delete(list(store.ids())[:2])
    else:
        store.add([Document(f"{number}-{n}", f"text {n} of {number}") for n in range(3)], encoder)
    sys.stdout.write(f"done {number} {' '.join(sorted(store.ids()))}\n")
    sys.stdout.flush()
