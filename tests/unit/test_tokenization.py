import json

import numpy as np
import pytest

from openembed.tokenization import TextTokenizer, TokenizerConfig

PROMPT = "Instruct: find it\nQuery: "


@pytest.fixture
def make_tokenizer(tokenizer_dir):
    def make(**fields):
        return TextTokenizer.from_folder(tokenizer_dir, TokenizerConfig(**{"eos_token": "</s>", **fields}))

    return make


def pooled(tokenizer, text, prompt, max_length=None):
    rows = tokenizer([text], prompt, max_length)
    return tokenizer.decode(rows.ids[0][rows.pool_starts[0] :])


@pytest.mark.parametrize("text", ["are judo", "7 days", "中文", " leading", "(bracket)", "\nnew line", ""])
def test_exact_span_pools_exactly_the_text_and_the_end_token(make_tokenizer, text):
    tokenizer = make_tokenizer()
    rows = tokenizer([text], PROMPT)
    assert rows.ids[0][-1] == 1
    # a token over the boundary belongs to the text; the instruction's own last space may travel with it
    assert pooled(tokenizer, text, PROMPT).lstrip(" ") == text.lstrip(" ")


def test_without_instruction_everything_is_pooled(make_tokenizer):
    assert make_tokenizer()(["some text"]).pool_starts.tolist() == [0]


def test_published_rule_counts_the_instruction_without_its_beginning_token(make_tokenizer):
    tokenizer = make_tokenizer(pool_instruction="exclude_by_count")
    alone = len(tokenizer.backend.encode(PROMPT, add_special_tokens=False).ids)
    assert tokenizer(["word"], PROMPT).pool_starts.tolist() == [alone]
    counted = make_tokenizer(pool_instruction="exclude_by_count_and_prefix")
    assert counted(["word"], PROMPT).pool_starts.tolist() == [alone + 1]
    assert make_tokenizer(pool_instruction="include")(["word"], PROMPT).pool_starts.tolist() == [0]


def test_truncation_rules(make_tokenizer):
    long = "word " * 100
    kept = make_tokenizer()([long], max_length=10).ids[0]
    cut = make_tokenizer(truncation="cut_end")([long], max_length=10).ids[0]
    assert (len(kept), kept[0], kept[-1]) == (10, 0, 1)
    assert len(cut) == 10
    assert cut[-1] != 1


def test_an_instruction_that_leaves_no_room_is_refused(make_tokenizer):
    for rule in ("exclude", "exclude_by_count"):
        for truncation in ("keep_eos", "cut_end"):
            tokenizer = make_tokenizer(pool_instruction=rule, truncation=truncation)
            with pytest.raises(ValueError, match="instruction takes"):
                tokenizer(["a text that has words"], "an instruction " * 10, max_length=12)
    with pytest.raises(ValueError, match="max_length 2"):
        make_tokenizer()(["text"], max_length=2)


def test_special_tokens_in_a_text_are_plain_characters(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer(["a</s>b<s>"]).ids[0].tolist()
    assert ids.count(1) == 1
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_odd_characters_have_defined_results(make_tokenizer):
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer(["lone \ud800 surrogate"]).ids[0]) == "lone \ufffd surrogate"
    assert tokenizer.decode(tokenizer(["nul \x00 byte"]).ids[0]) == "nul \x00 byte"
    assert tokenizer([""]).ids[0].tolist() == [0, 1]
    assert len(tokenizer(["x" * 1_000_000], max_length=32).ids[0]) == 32


def test_each_text_may_have_its_own_instruction(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = tokenizer(["one", "two"], [PROMPT, ""])
    assert rows.pool_starts[0] > 0
    assert rows.pool_starts[1] == 0
    np.testing.assert_array_equal(rows.ids[0], tokenizer(["one"], PROMPT).ids[0])
    with pytest.raises(ValueError, match="2 texts but 1 instructions"):
        tokenizer(["one", "two"], [PROMPT])


def test_wrong_types_and_files_are_named(make_tokenizer, tmp_path):
    with pytest.raises(TypeError, match=r"Write \[text\]"):
        make_tokenizer()("one string")
    with pytest.raises(TypeError, match="int"):
        make_tokenizer()([3])
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        TextTokenizer.from_folder(tmp_path, TokenizerConfig())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        TextTokenizer.from_folder(tmp_path, TokenizerConfig())
    with pytest.raises(ValueError, match="not in the tokenizer's vocabulary"):
        make_tokenizer(eos_token="<nope>")


def test_published_rule_on_the_reference_tokenizer(golden_dir):
    tokenizer = TextTokenizer.from_folder(
        golden_dir, TokenizerConfig(eos_token="</s>", truncation="cut_end", pool_instruction="exclude_by_count")
    )
    case = json.loads((golden_dir / "expected.json").read_text())[0]
    rows = tokenizer(case["prompts"], case["instruction"])
    alone = len(tokenizer.backend.encode(case["instruction"], add_special_tokens=False).ids)
    assert rows.pool_starts.tolist() == [alone] * 4
    assert all(row[0] == 1 and row[-1] == 2 for row in rows.ids)


def test_only_lists_of_strings_are_texts(make_tokenizer):
    tokenizer = make_tokenizer()
    np.testing.assert_array_equal(tokenizer(np.array(["one", "two"])).ids[1], tokenizer(["two"]).ids[0])
    for texts in ({"one": 1}, {"one"}, (text for text in ["one"])):
        with pytest.raises(TypeError, match="must be a list of strings"):
            tokenizer(texts)
    with pytest.raises(TypeError, match="instruction must be a string"):
        tokenizer(["one"], None)
    with pytest.raises(TypeError, match="NoneType"):
        tokenizer(["one", None])


def test_chunks_change_nothing(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer()
    texts, prompts = [f"text {i}" for i in range(7)], [PROMPT, ""] * 3 + [PROMPT]
    whole = tokenizer(texts, prompts)
    monkeypatch.setattr("openembed.tokenization.CHUNK", 3)
    parts = tokenizer(texts, prompts)
    np.testing.assert_array_equal(parts.pool_starts, whole.pool_starts)
    assert [row.tolist() for row in parts.ids] == [row.tolist() for row in whole.ids]


@pytest.mark.parametrize("rule", ["exclude", "exclude_by_count", "exclude_by_count_and_prefix", "include"])
def test_special_tokens_of_an_instruction_are_read_and_those_of_a_text_are_not(make_tokenizer, rule):
    tokenizer = make_tokenizer(pool_instruction=rule)
    rows = tokenizer(["one two", "a</s>b", "one two"], ["</s>ask: ", "</s>ask: ", ""])
    assert [row.tolist().count(1) for row in rows.ids] == [2, 2, 1]
    assert rows.ids[0].tolist()[:2] == [0, 1]
    np.testing.assert_array_equal(rows.ids[2], tokenizer(["one two"]).ids[0])
    if rule == "exclude":
        assert pooled(tokenizer, "one two", "</s>ask: ").strip() == "one two"
        assert pooled(tokenizer, "a</s>b", "</s>ask: ").strip() == "a< /s>b"
