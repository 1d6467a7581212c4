"""Documents in blocks: exact packing, budgets, formats, and a cache that is right whatever happens to its writers."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.labels import read_labels
from lightning_cl.datamodules.sources import ByteTokenizer, HashTokenizer, PackedTextSource
from lightning_cl.datamodules.sources.documents import Documents
from lightning_cl.datamodules.sources.token_cache import token_folder
from lightning_cl.datamodules.sources.tokens import PretrainedTokenizer
from ranks import exit_codes

TEXTS = ["abcdef", "g", "", "hijklmnopq"]
END = ByteTokenizer.eos_id


def write_rows(path: Path, texts: list[str]) -> str:
    """Write documents in the format of the suffix."""
    rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pytest.importorskip("datasets", reason="needs the extra llm").Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Four documents, one of them empty."""
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keep what `datasets` caches out of the user's home."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder for caches."""
    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        yield tmp_path / "home" / "lightning_cl" / "tokens"


def ids_of(text: str, end: bool = True) -> list[int]:
    """What the byte tokenizer must make of ASCII."""
    return [ord(letter) + 3 for letter in text] + [END] * end


def blocks(source: PackedTextSource) -> list[list[int]]:
    """The labels of each block without padding; checks the rest of the block against them."""
    found = []
    for sample in (source[index] for index in range(len(source))):
        ids, mask, labels = sample["input_ids"], sample["attention_mask"], sample["labels"]
        assert {column.dtype for column in sample.values()} == {torch.int64}
        assert {tuple(column.shape) for column in sample.values()} == {(source.block_size,)}
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (source.block_size - length)
        assert labels.tolist() == ids[:length].tolist() + [-100] * (source.block_size - length)
        assert (ids[length:] == source.pad_id).all()
        found.append(ids[:length].tolist())
    return found


# ---------------------------------------------------------------------- packing


def test_a_block_is_a_piece_of_one_document(rows: str) -> None:
    """Each document ends with the end-of-text token; its last piece is padded; an empty document is none."""
    source = PackedTextSource(rows, 4)
    assert blocks(source) == [
        ids_of("abcd", end=False),
        ids_of("ef"),
        ids_of("g"),
        ids_of("hijk", end=False),
        ids_of("lmno", end=False),
        ids_of("pq"),
    ]
    assert (source.num_documents, source.num_tokens) == (3, 7 + 2 + 11)
    assert source.padding_share == pytest.approx(4 / 24)
    assert source.vocab_size == 259


def test_a_document_of_exactly_one_block(tmp_path: Path) -> None:
    """No empty block follows it, and none of a single token, which has nothing to predict."""
    source = PackedTextSource(write_rows(tmp_path / "x.jsonl", ["abc", "defghij", "klmn"]), 4)
    assert blocks(source) == [ids_of("abc"), ids_of("defg", end=False), ids_of("hij"), ids_of("klmn", end=False)]
    assert (source.num_tokens, source.padding_share) == (16, 0)


def test_tails_may_be_dropped(rows: str) -> None:
    """Only whole blocks stay, and the tokens are counted so."""
    source = PackedTextSource(rows, 4, drop_tails=True)
    assert blocks(source) == [ids_of("abcd", end=False), ids_of("hijk", end=False), ids_of("lmno", end=False)]
    assert (source.num_tokens, source.padding_share) == (12, 0)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("text", "tail"), [("tu", 2), ("t", 1), ("", 3), ("tuvw", 0)])
def test_blocks_across_documents(text: str, tail: int, drop: bool, tmp_path: Path) -> None:
    """The documents are one sequence with an end-of-text token behind each; only its tail is padded, or left out."""
    path = write_rows(tmp_path / "x.jsonl", ["abcdef", "g", "hijklmnopq", "rs", text])
    source = PackedTextSource(path, 4, across_documents=True, drop_tails=drop)
    sequence = [token for text in ("abcdef", "g", "hijklmnopq", "rs", text) if text for token in ids_of(text)]
    expected = [sequence[start : start + 4] for start in range(0, len(sequence), 4)]
    assert len(sequence) % 4 == tail
    left_out = tail if drop or tail == 1 else 0
    assert blocks(source) == (expected[:-1] if left_out else expected)
    assert source.num_tokens == len(sequence) - left_out


@pytest.mark.parametrize("budget", [2, 6, 7, 9, 19, 20, 21])
def test_budget_ends_within_a_document(budget: int, rows: str) -> None:
    """Exactly so many tokens are kept, from the beginning; all when the budget is larger than the data."""
    source = PackedTextSource(rows, 32, max_tokens=budget)
    everything = ids_of("abcdef") + ids_of("g") + ids_of("hijklmnopq")
    assert [token for block in blocks(source) for token in block] == everything[:budget]
    assert source.num_tokens == min(budget, len(everything))
    assert source.num_documents == 1 + (budget > 7) + (budget > 9)
    assert np.load(source.folder / "tokens.npy").tolist() == everything[:budget]


def test_batches_equal_collated_samples(tmp_path: Path) -> None:
    """In any order, with repeats, of one and of several sources, in the main process and in workers."""
    rng = np.random.default_rng(0)
    texts = ["x" * int(length) for length in rng.integers(1, 60, 40)]
    source = PackedTextSource(write_rows(tmp_path / "x.jsonl", texts), 16)
    other = PackedTextSource(write_rows(tmp_path / "y.jsonl", texts[:5]), 16)
    for data in (source, ConcatDataset([source, other]), pickle.loads(pickle.dumps(source))):
        reader = batch_reader(data)
        assert reader.deterministic
        indices = rng.integers(0, len(data), 64)
        batch, expected = reader(indices), default_collate([data[int(index)] for index in indices])
        assert batch.keys() == expected.keys()
        for key in batch:
            assert torch.equal(batch[key], expected[key])
    loaded = torch.cat([batch["labels"] for batch in DataLoader(source, batch_size=8, num_workers=1)])
    assert torch.equal(loaded, source.read_batch(np.arange(len(source)))["labels"])
    assert torch.equal(source[-1]["labels"], source[len(source) - 1]["labels"])
    with pytest.raises(IndexError):
        source[len(source)]


def test_labels_of_tokens_are_no_class_labels(rows: str) -> None:
    """Neither of a source nor of other data whose labels are one for each token."""
    assert read_labels(PackedTextSource(rows, 4), required=False) is None
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]})
    assert read_labels(tokens, required=False) is None


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".parquet"])
def test_files_of_rows_read_alike(suffix: str, tmp_path: Path, hub_cache: Any) -> None:
    """Non-ASCII text too, and a name with the marks of a glob."""
    texts = [*TEXTS, "Grüße, 世界\r\n"]
    source = PackedTextSource(write_rows(tmp_path / f"x[1]{suffix}", texts), 64)
    decoded = [ByteTokenizer().decode(block) for block in blocks(source)]
    assert decoded == [text for text in texts if text]


def test_text_files_and_globs(tmp_path: Path) -> None:
    """A file is a document, or each of its lines is; globs are read in sorted order, behind what stands before."""
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "bb\r\nB\n"), ("a.txt", "a"), ("deep/c.py", "c")):
        (tmp_path / name).write_bytes(text.encode())
    files = [str(tmp_path / "deep" / "*.py"), str(tmp_path / "*.txt")]
    decode = ByteTokenizer().decode
    assert [decode(block) for block in blocks(PackedTextSource(files, 16))] == ["c", "a", "bb\r\nB\n"]
    assert [decode(block) for block in blocks(PackedTextSource(files, 16, lines=True))] == ["c", "a", "bb", "B"]
    every = PackedTextSource(str(tmp_path / "**" / "*.[tp][xy]*"), 16)
    assert [decode(block) for block in blocks(every)] == ["a", "bb\r\nB\n", "c"]


def test_fields_of_a_json_object(tmp_path: Path) -> None:
    """And a key of another name."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [{"body": "one"}], "b": [{"body": "two"}], "c": 3}))
    source = PackedTextSource(str(path), 8, text="body", field=["b", "a"])
    assert blocks(source) == [ids_of("two"), ids_of("one")]


@pytest.mark.parametrize("kind", ["saved", "folder", "object"])
def test_map_style_datasets(kind: str, tmp_path: Path, hub_cache: Any) -> None:
    """Of `save_to_disk`, of a folder with files, and in Python; other data makes another cache."""
    made = {}
    for part, texts in (("one", TEXTS), ("two", ["other"])):
        data = hub_cache.Dataset.from_dict({"text": texts})
        path: Any = data
        if kind == "saved":
            path = str(tmp_path / part)
            data.save_to_disk(path)
        elif kind == "folder":
            path = str(tmp_path / part)
            (tmp_path / part).mkdir()
            write_rows(tmp_path / part / "train.jsonl", texts)
        made[part] = PackedTextSource(path, 16)
    assert blocks(made["one"]) == [ids_of(text) for text in TEXTS if text]
    assert blocks(made["two"]) == [ids_of("other")]
    assert made["one"].folder != made["two"].folder


def test_stream_is_read_once(hub_cache: Any) -> None:
    """Up to the budget and not further, then from the cache: samples stay the same though the stream would differ."""
    read = []

    def stream() -> Iterator[dict[str, str]]:
        while True:
            read.append(1)
            yield {"text": f"text {len(read):05d}"}

    def source(name: str) -> PackedTextSource:
        return PackedTextSource(
            hub_cache.IterableDataset.from_generator(stream), 11, max_tokens=11 * 1500, revision=name
        )

    first = source("monday")
    assert len(first) == 1500
    assert len(read) <= 2001
    before, again = len(read), source("monday")
    assert len(read) == before
    assert blocks(again) == blocks(first)
    assert blocks(source("tuesday"))[0] == ids_of(f"text {before + 1:05d}")


def test_stream_of_a_dataset_by_name(tmp_path: Path, hub_cache: Any) -> None:
    """Read as a stream from where its name leads; the cache serves when the data is gone."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ["abcdef"] * 50)
    source = PackedTextSource(str(folder), 7, streaming=True, max_tokens=21)
    assert blocks(source) == [ids_of("abcdef")] * 3
    (folder / "train.jsonl").unlink()
    assert blocks(PackedTextSource(str(folder), 7, streaming=True, max_tokens=21)) == blocks(source)


# ---------------------------------------------------------------------- tokenizers


def test_bytes_read_back_what_they_wrote() -> None:
    """Any text: all code points, line ends, zero bytes, lone surrogates as JSON files may hold them."""
    tokenizer = ByteTokenizer()
    texts = [
        "",
        "\0 \r\n",
        "naïve 世界 🙂",
        json.loads(r'"a \ud800 b \udc00"'),
        "".join(map(chr, range(0, 0x110000, 97))),
    ]
    ids, lengths = tokenizer.encode_documents(texts)
    ends = np.cumsum(lengths)
    assert [tokenizer.decode(part) for part in np.split(ids, ends[:-1])] == texts
    assert (ids[ends - 1] == END).all()
    assert (np.flatnonzero(ids == END) == ends - 1).all()
    assert ids.min() >= END
    assert ids.max() < tokenizer.vocab_size
    rows, mask = tokenizer.encode(["Hi", "long text"], 4)
    assert rows.tolist() == [[75, 108, 0, 0], ids_of("long", end=False)]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokenizer.decode(torch.tensor([0, 1, 75, 300, 2])) == "H"


def test_bytes_that_are_no_text_are_shown_so() -> None:
    """A model may write half a character."""
    assert ByteTokenizer().decode([0xC3 + 3, ord("a") + 3]) == "\ufffda"


def save_tokenizer(path: Path, words: list[str], template: str = "", gap: int = 0, **special: str) -> str:
    """Make a word-level tokenizer of transformers, with unused ids before its last word, and special tokens."""
    transformers = pytest.importorskip("transformers", reason="needs the extra llm")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[BOS]", "[EOS]", *words])}
    vocabulary[words[-1]] += gap
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("template", ["", "[BOS] $A", "$A [EOS]"])
def test_tokenizer_of_transformers(template: str, tmp_path: Path) -> None:
    """It adds what it adds, and each document ends with one end of text, which also pads."""
    name = save_tokenizer(tmp_path / "t", ["red", "green"], template, bos_token="[BOS]", eos_token="[EOS]")
    path = write_rows(tmp_path / "x.jsonl", ["red green", "green \ud800"])
    source = PackedTextSource(path, 8, tokenizer=name)
    first = [1] if "[BOS]" in template else []
    assert blocks(source) == [[*first, 3, 4, 2], [*first, 4, 0, 2]]
    assert (source.vocab_size, source.pad_id) == (5, 2)


def test_ids_are_stored_in_as_few_bytes_as_they_need(tmp_path: Path) -> None:
    """Two, or four where the vocabulary is larger."""
    path = write_rows(tmp_path / "x.jsonl", ["w5 w69999 w5"])
    small = PackedTextSource(path, 8)
    words = [f"w{number}" for number in range(70_000)]
    large = PackedTextSource(path, 8, tokenizer=save_tokenizer(tmp_path / "t", words, eos_token="[EOS]"))
    assert [np.load(source.folder / "tokens.npy").dtype for source in (small, large)] == [np.uint16, np.uint32]
    assert blocks(large) == [[8, 70_002, 8, 2]]
    name = save_tokenizer(tmp_path / "gap", ["w5", "w69999"], gap=70_000, eos_token="[EOS]")
    assert blocks(gapped := PackedTextSource(path, 8, tokenizer=name)) == [[3, 70_004, 3, 2]]
    assert gapped.vocab_size == 70_005


def test_tokenizer_is_the_same_after_it_was_used(tmp_path: Path) -> None:
    """Those of transformers keep the settings of their last call; what tells them apart does not."""
    name = save_tokenizer(tmp_path / "t", ["red", "green"], eos_token="[EOS]")
    tokenizer = PretrainedTokenizer(name)
    before = tokenizer.identity
    tokenizer.encode(["red green"], max_length=1)
    assert tokenizer.identity == before
    assert tokenizer.decode(torch.tensor([3, 4, 2])) == "red green"


# ---------------------------------------------------------------------- the cache


def unnoticed_change(path: str, text: str) -> None:
    """Change a file's content, but neither its size nor its time."""
    before = Path(path).stat()
    Path(path).write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path(path).stat().st_size == before.st_size


def test_second_construction_reads_the_cache(tmp_path: Path, cache_home: Path) -> None:
    """The file is not opened again; block size and packing are no matter of the cache."""
    (tmp_path / "x.txt").write_text("abcdef")
    path = str(tmp_path / "x.txt")
    assert blocks(PackedTextSource(path, 8)) == [ids_of("abcdef")]
    unnoticed_change(path, "ABCDEF")
    (lock,) = cache_home.glob("*.lock")
    lock.unlink()
    assert blocks(PackedTextSource(path, 8)) == [ids_of("abcdef")]
    assert len(blocks(PackedTextSource(path, 2, drop_tails=True))) == 3
    assert len(list(cache_home.glob("*/tokens.npy"))) == 1
    assert not lock.exists(), "nothing is written where everything is there: a shared cache may be read-only"
    assert blocks(PackedTextSource(path, 8, cache_dir=tmp_path / "elsewhere")) == [ids_of("ABCDEF")]
    assert len(list((tmp_path / "elsewhere").glob("*/tokens.npy"))) == 1


def test_another_file_setting_or_tokenizer_makes_another_cache(tmp_path: Path) -> None:
    """Whatever the tokens depend on; a tokenizer goes by its content, not by its name."""
    path = tmp_path / "x.txt"
    path.write_text("red\ngreen")
    name = save_tokenizer(tmp_path / "t", ["red", "green"], eos_token="[EOS]")
    folders = [
        PackedTextSource(str(path), 8).folder,
        PackedTextSource(str(path), 8, max_tokens=3).folder,
        PackedTextSource(str(path), 8, lines=True).folder,
        PackedTextSource(str(path), 8, tokenizer=name).folder,
    ]
    save_tokenizer(tmp_path / "t", ["green", "red"], eos_token="[EOS]")
    source = PackedTextSource(str(path), 8, tokenizer=name)
    assert blocks(source) == [[4, 3, 2]]
    folders.append(source.folder)
    os.utime(path, ns=(0, 1))
    folders.append(PackedTextSource(str(path), 8).folder)
    path.write_text("RED\ngreen!")
    os.utime(path, ns=(0, 1))
    source = PackedTextSource(str(path), 16)
    assert blocks(source) == [ids_of("RED\ngreen!")]
    assert len({*folders, source.folder}) == 7


def killed_in_the_middle(path: Path, cache: Path) -> None:
    """Die when the first batches are on disk."""

    def read() -> Iterator[str]:
        for number in range(2500):
            if number == 2400:
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"document {number}"

    token_folder(cache, Documents("texts", ["a name"], read), ByteTokenizer(), None)


def test_writer_killed_in_the_middle_leaves_no_cache(tmp_path: Path) -> None:
    """The next process makes it from the beginning, and clears away what was left."""
    assert exit_codes(killed_in_the_middle, tmp_path, tmp_path / "cache") == [-signal.SIGKILL]
    left = list((tmp_path / "cache").glob("*.partial"))
    assert len(left) == 1
    documents = Documents("texts", ["a name"], lambda: iter(["abc"]))
    folder = token_folder(tmp_path / "cache", documents, ByteTokenizer(), None)
    assert np.load(folder / "tokens.npy").tolist() == ids_of("abc")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_writer_that_fails_leaves_nothing(tmp_path: Path, cache_home: Path) -> None:
    """Here at the second batch, at a row without a text."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 1500 + '{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"no text in row 1500 of 'x.jsonl', which has keys \['txt'\]"):
        PackedTextSource(str(path), 8)
    assert [entry.suffix for entry in cache_home.iterdir()] == [".lock"]


class SlowTexts:
    """Counts, over all processes, who reads it, and holds its reader until another process has come to wait."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self) -> Iterator[str]:
        (self.root / f"reader-{os.getpid()}").touch()
        yield "abc"
        barrier.wait(60)
        yield "def"


barrier = multiprocessing.get_context("fork").Barrier(2)


def one_of_two(root: Path) -> None:
    """Make, or wait for, the same tokens; the one that does not write arrives while the other is writing."""
    documents = Documents("texts", ["a name"], SlowTexts(root))
    if os.environ["RANK"] == "1":
        while not list(root.glob("reader-*")):
            pass
        assert list((root / "cache").glob("*.partial"))
        barrier.wait(60)
    folder = token_folder(root / "cache", documents, ByteTokenizer(), None)
    assert np.load(folder / "tokens.npy").tolist() == ids_of("abc") + ids_of("def")


@pytest.mark.distributed
def test_two_processes_at_once_make_one_cache(tmp_path: Path) -> None:
    """One reads the texts, the other finds the result complete."""
    assert exit_codes(one_of_two, tmp_path, world_size=2) == [0, 0]
    assert len(list(tmp_path.glob("reader-*"))) == 1
    assert len(list((tmp_path / "cache").glob("*/tokens.npy"))) == 1


def test_without_locks_the_first_writer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write; the second finds the name taken, keeps what is there and leaves nothing else."""

    def no_locks(*_: Any) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr("fcntl.flock", no_locks)
    folders = []

    def second() -> Iterator[str]:
        # while this one reads, the other comes and completes
        quick = Documents("texts", ["a name"], lambda: iter(["first"]))
        folders.append(token_folder(tmp_path, quick, ByteTokenizer(), None))
        yield "second"

    folders.append(token_folder(tmp_path, Documents("texts", ["a name"], second), ByteTokenizer(), None))
    assert folders[0] == folders[1]
    assert np.load(folders[0] / "tokens.npy").tolist() == ids_of("first")
    assert not list(tmp_path.glob("*.partial"))


def test_what_hinders_the_last_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a name that is taken is no failure."""

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no space left"):
        token_folder(tmp_path, Documents("texts", ["a name"], lambda: iter(["a"])), ByteTokenizer(), None)


def test_tokenizing_keeps_few_texts_in_memory(tmp_path: Path) -> None:
    """As many as make a thousand documents or a million characters, whichever comes first."""
    sizes = []

    class Watched(ByteTokenizer):
        def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            sizes.append((len(texts), sum(map(len, texts))))
            return super().encode_documents(texts)

    for name, length, count, expected in (("short", 3, 2500, [1000, 1000, 500]), ("long", 300_000, 9, [4, 4, 1])):
        sizes.clear()
        documents = Documents(name, [name], lambda text="x" * length, count=count: (text for _ in range(count)))
        folder = token_folder(tmp_path, documents, Watched(), None)
        assert [documents for documents, _ in sizes] == expected
        assert len(np.load(folder / "tokens.npy")) == count * (length + 1)


# ---------------------------------------------------------------------- refusals and YAML


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "`block_size` must be at least 2"),
        ({"max_tokens": 0}, "`max_tokens` must be above 0"),
        ({"tokenizer": "hash"}, "cannot be turned back into text"),
        ({"lines": True}, "`lines=True` splits text files, but 'rows.jsonl' holds rows"),
        ({"field": "a"}, "`field='a'` picks a key of a .json file, but 'rows.jsonl' is none"),
        (
            {"text": "body"},
            r"`text='body'` names no text in row 0 of 'rows.jsonl', which has keys \['number', 'text'\]",
        ),
        ({"text": "number"}, "names no text in row 0"),
        ({"streaming": True, "max_tokens": 5}, "`streaming` does not go with a `path` that is files"),
        ({"split": "test"}, "`split` does not go with a `path` that is files"),
        ({"streaming": True}, "give the budget `max_tokens`"),
        (
            {"drop_tails": True, "block_size": 16},
            "No document of .*rows.jsonl has the 16 tokens of a block .* Lower `block_size`",
        ),
        ({"max_tokens": 1}, "has the 2 tokens of a block .*`max_tokens=1`"),
        ({"path": ["rows.jsonl", "other/*.txt"]}, r"names no file: \['other/\*.txt'\]"),
        ({"path": "missing.jsonl"}, r"names no file: \['missing.jsonl'\]"),
        ({"path": "table.csv"}, "'table.csv' is a table"),
        ({"path": "latin.txt"}, "latin.txt' is no text in UTF-8"),
        ({"path": "broken.jsonl"}, "Line 2 of 'broken.jsonl' is no valid JSON"),
        ({"path": "empty.txt"}, "empty.txt holds no text"),
        ({"path": 3}, "must be files, the name of a dataset, or a Hugging Face dataset, got int"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str, rows: str) -> None:
    """By name, with what was given, before anything is trained."""
    Path("table.csv").touch()
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("empty.txt").touch()
    with pytest.raises(ValueError, match=message):
        PackedTextSource(**({"path": rows} | settings))


def test_datasets_are_refused(hub_cache: Any) -> None:
    """A stream without a name, settings of files, a column that is not there."""
    data = hub_cache.Dataset.from_dict({"text": ["a"]})
    for path, settings, message in (
        (data, {"text": "body"}, r"`text='body'` is no column of Dataset; it has \['text'\]"),
        (data, {"lines": True}, "`lines` does not go with a `path` that is a dataset"),
        (data.to_iterable_dataset(), {}, "name it by `revision`"),
        (data.to_iterable_dataset(), {"revision": "1", "text": "body"}, "`text='body'` is no column"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedTextSource(path, **settings)


def test_tokenizer_without_an_end_does_not_join_documents(tmp_path: Path, rows: str) -> None:
    """Blocks across documents need the token between them; pieces of one document do not."""
    name = save_tokenizer(tmp_path / "t", ["g"])
    with pytest.raises(ValueError, match="puts end-of-text tokens between documents"):
        PackedTextSource(rows, 4, tokenizer=name, across_documents=True)
    path = write_rows(tmp_path / "x.jsonl", ["g g", "g", "g b g b g"])
    assert blocks(PackedTextSource(path, 4, tokenizer=name)) == [[3, 3], [3, 0, 3, 0]]


def test_built_from_a_configuration(rows: str) -> None:
    """As a dataset of a stream, by its short name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=Dataset | list[Dataset])
    config = {"class_path": "lightning_cl.datamodules.PackedTextSource", "init_args": {"path": rows, "block_size": 4}}
    parsed = parser.instantiate(parser.parse_object({"train": [config, config]}))
    assert [len(source) for source in parsed.train] == [6, 6]


def test_hash_tokenizer_is_refused_as_an_object_too(rows: str) -> None:
    """Its ids cannot be read back."""
    with pytest.raises(ValueError, match="cannot be turned back"):
        PackedTextSource(rows, tokenizer=HashTokenizer())  # type: ignore[arg-type]
