import random

import pytest

from openembed.documents import read_documents
from openembed.shards import divide


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
@pytest.mark.parametrize("seed", range(8))
def test_shards_read_alone_hold_what_the_file_holds(tmp_path, name, seed):
    """Blank lines, lines that end in CR LF, other line separators inside texts, a byte-order mark, no last line feed."""
    rng = random.Random(seed)
    lines = []
    for number in range(rng.randrange(1, 60)):
        text = f"t{number} " + rng.choice(["", "ä\u2028ö", "\x85", "\x0b\x0c", "日本"])
        lines.append(f'{{"text": "{text}"}}' if name == "c.jsonl" and "\x0b" not in text else text.replace("\x0b\x0c", ""))
        if name == "c.jsonl" and not lines[-1].startswith("{"):
            lines[-1] = '{"text": "plain"}'
        if rng.random() < 0.3:
            lines.append(rng.choice(["", "  "]))
    end = rng.choice(["\n", "\r\n"])
    path = tmp_path / name
    path.write_bytes((rng.choice(["", "\ufeff"]) + end.join(lines) + rng.choice(["", end])).encode())
    documents = list(read_documents(path))
    size = rng.randrange(1, 9)
    count = -(-len(documents) // size)
    shards = list(divide(path, size, range(count)))
    assert [shard.number for shard in shards] == list(range(count))
    assert [document for shard in shards for document in shard.read(path)] == documents
    assert [shard.count for shard in shards] == [len(shard.read(path)) for shard in shards]
    wanted = sorted(rng.sample(range(count), count // 2))
    assert list(divide(path, size, wanted)) == [shards[number] for number in wanted]


def test_a_file_that_is_another_on_this_machine_is_refused(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    (first, second) = divide(path, 1, [0, 1])
    path.write_text('{"text": "one"}\n{"text": "too"}\n')
    assert first.read(path)[0].text == "one"
    with pytest.raises(ValueError, match=r"bytes 16 to 32 are not what the driver read"):
        second.read(path)
