"""Prompts and responses in blocks: what is learned, cut and refused, and how conversations are rendered."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import default_collate

from lightning_cl.datamodules import InstructionSource
from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.labels import read_labels
from lightning_cl.datamodules.sources import ByteTokenizer
from lightning_cl.datamodules.sources.instruction_format import InstructionFormat
from lightning_cl.datamodules.sources.tokens import PretrainedTokenizer

END = ByteTokenizer.eos_id
PAIRS = [{"prompt": "ab", "response": "cde"}, {"prompt": "f", "response": "g"}, {"prompt": "hij", "response": "k"}]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "more"},
]


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows in the format of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pytest.importorskip("datasets", reason="needs the extra llm").Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder for caches."""
    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        yield tmp_path / "home" / "lightning_cl" / "tokens"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keep what `datasets` caches out of the user's home."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def shown(ids: Any) -> str:
    """Bytes as text, with the end of text as a bar."""
    return "".join("|" if number == END else chr(number - 3) for number in ids)


def blocks(source: InstructionSource) -> list[tuple[str, str]]:
    """Each block as its text, and the same with a dot for what is not learned; checks the columns."""
    found = []
    for sample in (source[index] for index in range(len(source))):
        assert {column.dtype for column in sample.values()} == {torch.int64}
        assert {tuple(column.shape) for column in sample.values()} == {(source.block_size,)}
        ids, mask, labels = (sample[key] for key in ("input_ids", "attention_mask", "labels"))
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (source.block_size - length)
        assert (ids[length:] == source.pad_id).all()
        assert (labels[length:] == -100).all()
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        text = shown(ids[:length].tolist())
        found.append((text, "".join(letter if flag else "." for letter, flag in zip(text, learned, strict=False))))
    return found


# ---------------------------------------------------------------------- pairs


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_only_responses_and_their_ends_are_learned(suffix: str, tmp_path: Path, hub_cache: Any) -> None:
    """One example to a block, padded; the counts are those of the labels and of the padding."""
    source = InstructionSource(write_rows(tmp_path / f"x{suffix}", PAIRS), 8)
    assert blocks(source) == [("ab\ncde|", "...cde|"), ("f\ng|", "..g|"), ("hij\nk|", "....k|")]
    assert (source.num_examples, source.num_tokens, source.num_skipped, source.num_cut) == (3, 8, 0, 0)
    assert source.padding_share == pytest.approx(7 / 24)
    assert (source.vocab_size, source.pad_id) == (259, 0)


def test_template_keys_and_input(tmp_path: Path) -> None:
    """The input follows the prompt where there is any; braces of prompts and templates are text."""
    rows = [{"q": "a{b}", "c": "x", "a": "y"}, {"q": "d", "c": "", "a": "e"}, {"q": "f", "c": None, "a": "g"}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    source = InstructionSource(path, 32, prompt="q", response="a", input="c", template="{}Q:{prompt} A:")
    assert [text for text, _ in blocks(source)] == ["{}Q:a{b}\nx A:y|", "{}Q:d A:e|", "{}Q:f A:g|"]
    assert [learned.lstrip(".") for _, learned in blocks(source)] == ["y|", "e|", "g|"]


def test_nothing_precedes_the_first_token_of_an_example(tmp_path: Path) -> None:
    """So it is no label, though a response begins there, and packing does not make it one."""
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "", "response": "ab"}] * 2)
    assert blocks(InstructionSource(path, 6, template="{prompt}", pack=True)) == [("ab|ab|", ".b|.b|")]


# ---------------------------------------------------------------------- blocks


def test_packed_blocks_hold_whole_examples(tmp_path: Path) -> None:
    """As many as fit, in order; no example goes across the end of a block."""
    path = write_rows(tmp_path / "x.jsonl", PAIRS)
    assert [text for text, _ in blocks(InstructionSource(path, 11, pack=True))] == ["ab\ncde|f\ng|", "hij\nk|"]
    source = InstructionSource(path, 10, pack=True)
    assert blocks(source) == [("ab\ncde|", "...cde|"), ("f\ng|hij\nk|", "..g|....k|")]
    assert (source.num_examples, source.num_tokens) == (3, 8)
    assert source.padding_share == pytest.approx(3 / 20)


def test_packing_keeps_every_example(tmp_path: Path) -> None:
    """Of random lengths, in their order, each within one block; no block has room for the next example."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": "p" * int(rng.integers(1, 20)), "response": f"{i}" * int(rng.integers(1, 9))} for i in range(99)]
    source = InstructionSource(write_rows(tmp_path / "x.jsonl", rows), 48, pack=True)
    expected = [f"{row['prompt']}\n{row['response']}|" for row in rows]
    packed = [text for text, _ in blocks(source)]
    assert "".join(packed) == "".join(expected)
    sizes = [text.count("|") for text in packed]
    firsts = np.cumsum(sizes)[:-1]
    for text, following in zip(packed, firsts, strict=False):
        assert len(text) + len(expected[following]) > 48
    learned = sum(len(row["response"]) + 1 for row in rows)
    assert source.num_tokens == sum(len(mask.replace(".", "")) for _, mask in blocks(source)) == learned


@pytest.mark.parametrize("pack", [False, True])
def test_long_examples_are_cut_and_those_without_a_response_skipped(
    pack: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut at the end; skipped where the prompt fills the block; said once, with both numbers."""
    rows = [
        {"prompt": "a", "response": "bcdefg"},
        {"prompt": "hijkl", "response": "m"},
        {"prompt": "n", "response": "o"},
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    with caplog.at_level(logging.INFO):
        source = InstructionSource(path, 6, pack=pack)
    assert blocks(source) == [("a\nbcde", "..bcde"), ("n\no|", "..o|")]
    assert (source.num_examples, source.num_skipped, source.num_cut) == (2, 1, 1)
    assert source.num_tokens == 6
    assert len([r for r in caplog.records if "1 are cut at `block_size=6` tokens, and 1 are skipped" in r.message]) == 1
    with pytest.raises(ValueError, match=r"leave no room for a response \(`block_size=2`\); raise"):
        InstructionSource(path, 2)


@pytest.mark.parametrize(("budget", "examples"), [(7, 1), (10, 1), (11, 2), (16, 2), (17, 3), (100, 3)])
def test_budget_ends_between_examples(budget: int, examples: int, tmp_path: Path) -> None:
    """Reading stops before the example with which there were more tokens."""
    source = InstructionSource(write_rows(tmp_path / "x.jsonl", PAIRS), 16, max_tokens=budget)
    assert source.num_examples == examples
    with pytest.raises(ValueError, match=r"holds no example \(`max_tokens=6`\)"):
        InstructionSource(write_rows(tmp_path / "x.jsonl", PAIRS), 16, max_tokens=6)


def test_stream_without_end_is_read_up_to_the_budget(hub_cache: Any) -> None:
    """And not further, over many batches of rows; a later example that would fit is not taken."""
    read: list[int] = []

    def stream() -> Iterator[dict[str, str]]:
        while len(read) < 5000:
            read.append(1)
            yield {"prompt": "p" * (20 if len(read) == 1501 else 1), "response": "r"}

    data = hub_cache.IterableDataset.from_generator(stream)
    source = InstructionSource(data, 32, max_tokens=4 * 1500 + 5, revision="monday")
    assert source.num_examples == 1500
    assert len(read) <= 2001


@pytest.mark.parametrize("pack", [False, True])
def test_batches_equal_collated_samples(pack: bool, tmp_path: Path) -> None:
    """In any order, with repeats, and after pickling; labels of tokens are no classes."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": "p" * int(rng.integers(1, 20)), "response": "r" * int(rng.integers(1, 20))} for _ in range(50)]
    source = InstructionSource(write_rows(tmp_path / "x.jsonl", rows), 32, pack=pack)
    for data in (source, pickle.loads(pickle.dumps(source))):
        reader = batch_reader(data)
        assert reader.deterministic
        indices = rng.integers(0, len(data), 64)
        batch, expected = reader(indices), default_collate([data[int(index)] for index in indices])
        for key in expected:
            assert torch.equal(batch[key], expected[key])
    assert torch.equal(source[-1]["labels"], source[len(source) - 1]["labels"])
    with pytest.raises(IndexError):
        source[len(source)]
    assert read_labels(source, required=False) is None


# ---------------------------------------------------------------------- conversations


def test_conversation_without_a_chat_template(tmp_path: Path) -> None:
    """Roles on lines of their own; every answer is learned with an end of text; what follows the last is left out."""
    rows = [{"messages": CHAT, "prompt": None}, {"prompt": "a", "response": "b"}]
    source = InstructionSource(write_rows(tmp_path / "x.jsonl", rows), 64)
    text, learned = blocks(source)[0]
    assert text == "user:\nhi\nassistant:\nyo|user:\nbye\nassistant:\nok|"
    assert learned.replace(".", "") == "yo|ok|"
    assert learned.startswith(".........")
    assert blocks(source)[1] == ("a\nb|", "..b|")


MARKS = ["<s>", "</s>", "<turn>", "<end>"]
MARKED = (
    "<s>{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
REWRITING = "{% for m in messages %}{% if loop.last %}last {% endif %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def save_tokenizer(path: Path, chat_template: str | None, **special: str) -> str:
    """Make a word-level tokenizer that puts <s> in front of a text, with a chat template."""
    transformers = pytest.importorskip("transformers", reason="needs the extra llm")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", *MARKS, "user", "assistant", "hi", "yo", "bye", "ok", "more", ":", "last"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(MARKS)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", **special
    )
    made.chat_template = chat_template
    made.save_pretrained(path)
    return str(path)


def words_of(source: InstructionSource, path: str) -> tuple[str, str]:
    """The first block as words, and those that are learned."""
    from transformers import AutoTokenizer

    tokenizer, sample = AutoTokenizer.from_pretrained(path), source[0]
    ids = sample["input_ids"][sample["attention_mask"] == 1].tolist()
    learned = sample["labels"][sample["labels"] != -100].tolist()
    return " ".join(tokenizer.convert_ids_to_tokens(ids)), " ".join(tokenizer.convert_ids_to_tokens(learned))


def test_chat_template_renders_conversations(tmp_path: Path) -> None:
    """Its own marks end the answers, and its own beginning is the only one; the ids are those of the whole text."""
    name = save_tokenizer(tmp_path / "t", MARKED, eos_token="</s>")
    path = write_rows(tmp_path / "x.jsonl", [{"chat": CHAT}])
    source = InstructionSource(path, 32, tokenizer=name, messages="chat")
    text, learned = words_of(source, name)
    assert text == (
        "<s> <turn> user hi <end> <turn> assistant yo <end> <turn> user bye <end> <turn> assistant ok <end>"
    )
    assert learned == "yo <end> ok <end>"
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    whole = tokenizer.apply_chat_template(CHAT[:4])["input_ids"]
    assert source[0]["input_ids"][: len(whole)].tolist() == whole


def test_mark_of_an_end_is_learned_without_the_line_break_behind_it(tmp_path: Path) -> None:
    """Which the template writes in front of the next turn."""
    tokenizer = PretrainedTokenizer(save_tokenizer(tmp_path / "t", MARKED, eos_token="</s>"))
    parts = InstructionFormat("prompt", "response", None, "messages", "{prompt}", tokenizer).parts(
        "a", {"messages": CHAT}
    )
    assert [part.text for part in parts if part.response] == ["yo<end>", "ok<end>"]
    assert parts[2].text == "\n<turn>user\nbye<end>\n<turn>assistant\n"


def test_end_of_text_stands_where_a_template_has_no_mark(tmp_path: Path) -> None:
    """Behind every answer, so that a model learns to stop."""
    name = save_tokenizer(tmp_path / "t", BARE, eos_token="</s>")
    source = InstructionSource(write_rows(tmp_path / "x.jsonl", [{"messages": CHAT[:4]}]), 32, tokenizer=name)
    text, learned = words_of(source, name)
    assert text == "user : hi assistant : yo </s> user : bye assistant : ok </s>"
    assert learned == "assistant : yo </s> assistant : ok </s>", "the template has no prompt for an answer"


def test_template_that_rewrites_the_beginning_is_refused(tmp_path: Path) -> None:
    """Here it marks the last turn, so a turn looks otherwise when another follows; single answers are rendered."""
    name = save_tokenizer(tmp_path / "t", REWRITING, eos_token="</s>")
    path = write_rows(tmp_path / "x.jsonl", [{"messages": CHAT[:4]}])
    with pytest.raises(ValueError, match=r"in row 0 of 'x\.jsonl' anew when a turn follows.*Make one row of each"):
        InstructionSource(path, 32, tokenizer=name)


def test_tokenizer_of_transformers_begins_a_pair_once(tmp_path: Path) -> None:
    """With its special tokens in front of the prompt and none in front of the response; it must have an end of text."""
    name = save_tokenizer(tmp_path / "t", None, eos_token="</s>")
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "hi", "response": "yo ok"}])
    assert words_of(InstructionSource(path, 8, tokenizer=name), name) == ("<s> hi yo ok </s>", "yo ok </s>")
    with pytest.raises(ValueError, match="no end-of-text token"):
        InstructionSource(path, 8, tokenizer=save_tokenizer(tmp_path / "endless", None))


# ---------------------------------------------------------------------- datasets, cache, command line


def test_datasets_map_style_and_streams(tmp_path: Path, hub_cache: Any) -> None:
    """In Python, and a folder by name, also as a stream that the cache serves later."""
    expected = blocks(InstructionSource(write_rows(tmp_path / "x.jsonl", PAIRS), 8))
    data = hub_cache.Dataset.from_list(PAIRS)
    assert blocks(InstructionSource(data, 8)) == expected
    assert blocks(InstructionSource(data.to_iterable_dataset(), 8, revision="monday")) == expected
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", PAIRS)
    stream: dict[str, Any] = {"path": str(tmp_path / "data"), "block_size": 8, "streaming": True, "max_tokens": 11}
    assert blocks(InstructionSource(**stream)) == expected[:2]
    (tmp_path / "data" / "train.jsonl").unlink()
    assert blocks(InstructionSource(**stream)) == expected[:2]
    chats = hub_cache.Dataset.from_list([{"messages": CHAT}])
    assert blocks(InstructionSource(chats, 64))[0][1].replace(".", "") == "yo|ok|"


def test_cache_goes_by_what_the_tokens_depend_on(tmp_path: Path) -> None:
    """The template and the keys, not the block size and the packing."""
    rows = [{"prompt": "a", "response": "b", "other": "c", "messages": None}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    settings: list[dict[str, Any]] = [
        {},
        {"template": "{prompt} "},
        {"prompt": "other"},
        {"response": "other"},
        {"input": "other"},
        {"max_tokens": 100},
        {"messages": "talk"},
    ]
    made = [InstructionSource(path, 8, **given).folder for given in settings]
    assert len(set(made)) == len(settings)
    assert InstructionSource(path, 9, pack=True).folder == made[0]
    names = [save_tokenizer(tmp_path / name, chat, eos_token="</s>") for name, chat in (("one", MARKED), ("two", BARE))]
    assert len({InstructionSource(path, 8, tokenizer=name).folder for name in names}) == 2


def test_command_line_builds_it(tmp_path: Path) -> None:
    """From plain values."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(InstructionSource, "source")
    path = write_rows(tmp_path / "x.jsonl", PAIRS)
    given = {"class_path": "lightning_cl.datamodules.InstructionSource", "init_args": {"path": path, "pack": True}}
    source = parser.instantiate(parser.parse_object({"source": given})).source
    assert len(source) == 1


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"`response='response'` names no text in row 1 of 'x.jsonl', which has keys \['prompt'\]"),
        ({"question": "a", "response": "b"}, r"`prompt='prompt'` names no text in row 1.*Name the keys of your rows"),
        ({"prompt": "a", "response": 3}, r"`response='response'` names no text in row 1.*has int there"),
        ({"prompt": "a", "response": ""}, r"Row 1 of 'x.jsonl' has an empty response in 'response'; take the row out"),
        (["a", "b"], r"Row 1 of 'x.jsonl' must have keys and values, got \['a', 'b'\]"),
        ({"messages": CHAT[:1]}, r"of row 1 of 'x.jsonl' must have an answer.*roles \['user'\]; take the row out"),
        ({"messages": CHAT[1:]}, r"must have an answer of the role 'assistant' to something before it"),
        ({"messages": []}, r"must have an answer"),
        ({"messages": "hi"}, r"`messages='messages'` must be a list of .* in row 1 of 'x.jsonl' it is 'hi'"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"with text in both; in row 1 .*human"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
            r"A message of the assistant in row 1 of 'x.jsonl' is an empty response",
        ),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, tmp_path: Path, cache_home: Path) -> None:
    """With the way out; nothing is left in the cache."""
    path = write_rows(tmp_path / "x.jsonl", [PAIRS[0], row])
    with pytest.raises(ValueError, match=message):
        InstructionSource(path, 8)
    assert [entry.suffix for entry in cache_home.iterdir()] == [".lock"]


def test_input_must_be_there_where_it_is_named(tmp_path: Path) -> None:
    """A misspelt key would leave it out of every prompt."""
    with pytest.raises(ValueError, match=r"`input='context'` names no text in row 0"):
        InstructionSource(write_rows(tmp_path / "x.jsonl", PAIRS), 8, input="context")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "`block_size` must be at least 2"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"template": "prompt: "}, r"`template` must say where the prompt goes by '\{prompt\}', got 'prompt: '"),
        ({"tokenizer": "hash"}, "`tokenizer='hash'` cannot be turned back"),
        ({"field": "rows"}, r"`field='rows'` picks a key of a .json file, but 'x.jsonl' is none"),
        ({"config": "en"}, "`config` does not go with a `path` that is files"),
        ({"streaming": True}, "give the budget `max_tokens`"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And those that do not fit the data."""
    path = write_rows(tmp_path / "x.jsonl", PAIRS)
    with pytest.raises(ValueError, match=message):
        InstructionSource(path, **{"block_size": 8, **settings})


def test_plain_text_is_no_rows(tmp_path: Path) -> None:
    """It has no prompts."""
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must be files of rows .*'x.txt' is none; convert it"):
        InstructionSource(str(tmp_path / "x.txt"), 8)
