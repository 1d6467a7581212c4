"""Sources read what the files hold, number labels alike in all parts, and refuse what they cannot read."""

from __future__ import annotations

import csv
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.labels import check_label_names, read_column, read_labels
from lightning_cl.datamodules.sources import (
    ArraySource,
    DigitsSource,
    HashTokenizer,
    HFSource,
    Source,
    TextFileSource,
    as_dataset,
)

CLINC = Path(__file__).parents[2] / "../shared/data/clinc150/data_full.json"
ROWS = [
    {"text": "Hello there", "label": "greet", "site": "web"},
    {"text": "pay my bill", "label": "bank", "site": "app"},
    {"text": "hello", "label": "greet", "site": "app"},
    {"text": "", "label": "ask", "site": "web"},
]


def write_rows(path, rows):
    """Write rows in the format of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pytest.importorskip("datasets", reason="needs the extra llm").Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches out of the user's home, and off the network."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


# ---------------------------------------------------------------- arrays and digits


def test_array_source_holds_what_it_was_given(tmp_path):
    """Arrays, tensors and files give the same samples; dtypes stay."""
    inputs, labels = np.random.rand(5, 3).astype(np.float32), np.array([4, 0, 2, 2, 1], dtype=np.int16)
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", labels)
    np.save(tmp_path / "d.npy", np.array(["a", "b", "a", "b", "a"]))
    sources = [
        ArraySource(inputs, labels),
        ArraySource(torch.from_numpy(inputs), torch.from_numpy(labels)),
        ArraySource(str(tmp_path / "x.npy"), tmp_path / "y.npy", tmp_path / "d.npy"),
    ]
    for source in sources:
        assert len(source) == 5
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == [4, 0, 2, 2, 1]
        sample, label = source[2]
        assert sample.dtype == torch.float32
        assert torch.equal(sample, torch.from_numpy(inputs[2]))
        assert (label.dtype, label.item()) == (torch.int64, 2)
    assert sources[2].domains.tolist() == ["a", "b", "a", "b", "a"]
    assert torch.equal(ArraySource(inputs)[1], torch.from_numpy(inputs[1]))


def test_changing_a_sample_of_a_file_leaves_the_file(tmp_path):
    """The map is read-only; a transform in place works on a copy."""
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    source = ArraySource(tmp_path / "x.npy")
    source[0].add_(1)
    source.read_batch(np.array([0, 1])).add_(1)
    assert source[0].sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [0, 1]}, r"`labels` must hold one value for each of the 3 inputs, got shape \(2,\)"),
        ({"labels": np.zeros((3, 1), dtype=int)}, r"got shape \(3, 1\)"),
        ({"labels": np.zeros(3)}, "`labels` must be integers, got float64.*`TensorDataset`"),
        ({"domains": ["a"]}, "`domains` must hold one value for each of the 3"),
    ],
)
def test_array_source_refuses(settings, message):
    """Lengths and types, by name."""
    with pytest.raises(ValueError, match=message):
        ArraySource(np.zeros((3, 2)), **settings)


def test_digits_parts():
    """60/20/20 within each class, disjoint, together all 1797 images; scaled to [0, 1]."""
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra examples")
    digits = sklearn_datasets.load_digits()
    parts = {split: DigitsSource(split) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [1078, 360, 359]
    counts = np.bincount(digits.target)
    for (_, part), share in zip(parts.items(), (0.6, 0.2, 0.2), strict=True):
        assert (np.abs(np.bincount(part.labels) - share * counts) <= 1).all()
    rows = torch.cat([part.columns[0] for part in parts.values()])
    expected = digits.images.reshape(1797, 64).astype(np.float32) / 16
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    assert (rows.min(), rows.max(), rows.dtype) == (0, 1, torch.float32)
    assert not torch.equal(DigitsSource("val", seed=1).columns[0][:300], parts["val"].columns[0][:300])
    image, label = DigitsSource("train", flatten=False)[7]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image.flatten(), parts["train"][7][0])
    assert label == parts["train"].labels[7]
    with pytest.raises(ValueError, match=r"`split` must be one of \('train', 'val', 'test'\), got 'dev'"):
        DigitsSource("dev")
    odd = DigitsSource("train", target="odd")
    assert (odd.labels + 2 * odd.domains == parts["train"].labels).all()
    assert [int(odd[row][1]) for row in range(9)] == odd.labels[:9].tolist()
    assert torch.equal(odd.columns[0], parts["train"].columns[0])
    with pytest.raises(ValueError, match="`target` must be one of 'digit', 'odd', got 'even'"):
        DigitsSource(target="even")


# ---------------------------------------------------------------- text files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"])
def test_formats_read_alike(suffix, tmp_path, request):
    """One table in every format gives the same ids, labels and domains."""
    if suffix == ".parquet":
        request.getfixturevalue("hub_cache")
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    source = TextFileSource(path, domain="site", max_length=3, tokenizer=HashTokenizer(vocab_size=100))

    def number(word):
        return 1 + zlib.crc32(word.encode()) % 99

    assert source.label_names == ["ask", "bank", "greet"]
    assert source.labels.tolist() == [2, 1, 2, 0]
    assert source.domains.tolist() == ["web", "app", "app", "web"]
    assert source.columns[0].tolist() == [
        [number("hello"), number("there"), 0],
        [number("pay"), number("my"), number("bill")],
        [number("hello"), 0, 0],
        [0, 0, 0],
    ]
    assert source.vocab_size == 100
    ids, label = source[1]
    assert (ids.dtype, label.dtype, label.item()) == (torch.int64, torch.int64, 1)


def test_json_lines_under_another_name(tmp_path):
    """Files of lines are often called .json."""
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert TextFileSource(path).labels.tolist() == [2, 1, 2, 0]


def test_rows_may_be_lists_in_any_order(tmp_path):
    """Text first and label second, unless positions are given."""
    pairs = write_rows(tmp_path / "pairs.json", [["one two", "b"], ["three", "a"]])
    assert TextFileSource(pairs).labels.tolist() == [1, 0]
    triples = write_rows(tmp_path / "triples.json", [["b", "web", "one two"], ["a", "app", "three"]])
    source = TextFileSource(triples, text=2, label=0, domain=1)
    assert source.domains.tolist() == ["web", "app"]
    assert torch.equal(source.columns[0], TextFileSource(pairs).columns[0])


def test_fields_share_a_label_set(tmp_path):
    """A part that lacks a class would number the others anew: the named rows define the label set."""
    path = write_rows(
        tmp_path / "nested.json",
        {"train": [["x", "a"], ["x", "b"], ["x", "c"]], "val": [["x", "c"], ["x", "b"]], "extra": [["x", "oos"]]},
    )
    train, alone = TextFileSource(path, "train"), TextFileSource(path, "val")
    with pytest.raises(ValueError, match="`train` and `val` number their labels differently"):
        check_label_names({"train": train, "val": alone})
    val = TextFileSource(path, "val", label_field="train")
    assert (val.label_names, val.labels.tolist()) == (["a", "b", "c"], [2, 1])
    check_label_names({"train": train, "val": val})
    assert TextFileSource(path, "val", label_names=["c", "b", "a"]).labels.tolist() == [0, 1]
    joined = TextFileSource(path, ["train", "extra"], label_field=["extra", "train"])
    assert (joined.label_names, len(joined)) == (["a", "b", "c", "oos"], 4)
    val_file = write_rows(tmp_path / "val.csv", [{"text": "x", "label": "c"}])
    train_file = write_rows(tmp_path / "train.csv", [{"text": "x", "label": name} for name in "abc"])
    assert TextFileSource(val_file, label_path=train_file).labels.tolist() == [2]
    with pytest.raises(ValueError, match=r"1 labels are not in the label set of 3 names: \['oos'\].*`label_names`"):
        TextFileSource(path, "extra", label_field="train")


@pytest.mark.parametrize(
    ("labels", "settings", "expected", "names"),
    [
        ([7, 0, 7], {}, [7, 0, 7], None),
        (["7", "0", "7"], {}, [7, 0, 7], None),
        (["7", "0", "7"], {"label_names": ["7", "0"]}, [0, 1, 0], ["7", "0"]),
        (["7", "b", "7"], {}, [0, 1, 0], ["7", "b"]),
    ],
)
def test_numbers_stay_and_names_are_numbered(labels, settings, expected, names, tmp_path):
    """Digits, as a CSV file gives them, are numbers unless a label set names them."""
    path = write_rows(tmp_path / "rows.json", [{"text": "x", "label": label} for label in labels])
    source = TextFileSource(path, **settings)
    assert (source.labels.tolist(), source.label_names) == (expected, names)


def test_parts_of_one_file(tmp_path):
    """80/10/10 within each class, disjoint, reproducible, with the label set of the whole file."""
    rows = [{"text": f"row{number}", "label": "ab"[number % 2]} for number in range(200)] + [
        {"text": "row200", "label": "rare"}
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    tokenizer = HashTokenizer(vocab_size=10**9)
    parts = [TextFileSource(path, split=split, tokenizer=tokenizer) for split in ("train", "val", "test")]
    assert [Counter(part.labels.tolist()) for part in parts] == [{0: 80, 1: 80, 2: 1}, {0: 10, 1: 10}, {0: 10, 1: 10}]
    assert all(part.label_names == ["a", "b", "rare"] for part in parts)
    texts = [row for part in parts for row in part.columns[0][:, 0].tolist()]
    assert sorted(texts) == sorted(TextFileSource(path, tokenizer=tokenizer).columns[0][:, 0].tolist())
    again = TextFileSource(path, split="val", tokenizer=tokenizer)
    assert torch.equal(again.columns[0], parts[1].columns[0])
    other = TextFileSource(path, split="val", tokenizer=tokenizer, seed=1)
    assert not torch.equal(other.columns[0], parts[1].columns[0])


def test_samples_for_models_of_transformers(tmp_path):
    """Dicts with the mask of the words; batches are those of default collation."""
    source = TextFileSource(write_rows(tmp_path / "rows.json", ROWS), as_dict=True, max_length=4)
    sample = source[0]
    assert list(sample) == ["input_ids", "attention_mask", "labels"]
    assert sample["attention_mask"].tolist() == [1, 1, 0, 0]
    batch = batch_reader(source)([3, 1])
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0, 1]


def test_hash_tokenizer_ngrams_and_limits():
    """Single words first, then pairs, cut at the length; ids stay below the size of the vocabulary."""
    tokenizer = HashTokenizer(vocab_size=50, ngrams=2)
    ids, mask = tokenizer.encode(["A b, a"], max_length=9)
    terms = ["a", "b", ",", "a", "a b", "b ,", ", a"]
    assert ids[0].tolist() == [1 + zlib.crc32(term.encode()) % 49 for term in terms] + [0, 0]
    assert mask[0].tolist() == [1] * 7 + [0] * 2
    assert tokenizer.encode(["A b, a"], max_length=2)[0].tolist() == [ids[0][:2].tolist()]
    many, _ = tokenizer.encode([" ".join(str(n) for n in range(2000))], max_length=2000)
    assert (many.min(), many.max()) == (1, 49)
    with pytest.raises(ValueError, match=r"`vocab_size` must be at least 2.*got 1"):
        HashTokenizer(vocab_size=1)
    with pytest.raises(ValueError, match="`ngrams` must be at least 1, got 0"):
        HashTokenizer(ngrams=0)


def word_tokenizer(folder, pad_token):
    """Save a small tokenizer of transformers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra llm")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "hello": 2, "there": 3, "<end>": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, unk_token="[UNK]", eos_token="<end>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("pad_token", "padding"), [("[PAD]", 0), (None, 4)])
def test_tokenizer_of_transformers(pad_token, padding, tmp_path):
    """Its ids and mask; without a padding token the end-of-text token pads."""
    name = word_tokenizer(tmp_path / "tokenizer", pad_token)
    rows = [{"text": "hello there", "label": 0}, {"text": "hello hello you there", "label": 1}]
    source = TextFileSource(write_rows(tmp_path / "rows.json", rows), tokenizer=name, max_length=3, as_dict=True)
    assert source.columns[0].tolist() == [[2, 3, padding], [2, 2, 1]]
    assert source.columns[1].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert source.vocab_size == 5


NESTED = {"train": [["x", "a"]], "note": "hi"}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "`path` must be an existing file"),
        (NESTED, {}, r"`field` must name lists of rows in 'rows.json', got None; it has \['train'\]"),
        (NESTED, {"field": "dev"}, r"got 'dev'; it has \['train'\]"),
        (NESTED, {"field": "note"}, r"got 'note'; it has \['train'\]"),
        (ROWS, {"field": "train"}, "`field='train'` picks a key, but 'rows.json' is a plain list"),
        ([], {}, "'rows.json' holds no row"),
        ({"train": []}, {"field": "train"}, "'rows.json' holds no row in 'train'"),
        (3, {}, "must hold a list of rows"),
        (ROWS, {"text": "body"}, r"`text='body'` is missing in row 0, which has keys \['label', 'site', 'text'\]"),
        (ROWS, {"domain": "year"}, "`domain='year'` is missing in row 0"),
        ([["x", "a"], ["y"]], {}, r"`label=1` is missing in row 1, which has \['y'\]"),
        ([["x", "a"]], {"domain": "site"}, "Rows are lists: `domain` must be a position, got 'site'"),
        ([["x", 0.5]], {}, "Labels must be integers or text, got 0.5"),
        ([["x", True]], {}, "Labels must be integers or text, got True"),
        (ROWS, {"max_length": 0}, "`max_length` must be at least 1, got 0"),
        (ROWS, {"label_names": ["ask", "ask"]}, "`label_names` must hold each name once"),
        (ROWS, {"label_names": ["ask"]}, r"2 labels are not in the label set of 1 names: \['bank', 'greet'\]"),
        (ROWS, {"label_names": ["ask"], "label_field": "x"}, "`label_names` is the label set; leave out `label_field`"),
        (ROWS, {"split": "dev"}, "`split` must be one of"),
        (ROWS, {"split": "val"}, "`split='val'` of the 4 rows of 'rows.json' is empty"),
    ],
)
def test_text_file_refuses(content, settings, message, tmp_path):
    """The message names the setting and what the file has."""
    path = tmp_path / "rows.json"
    if content is not None:
        write_rows(path, content)
    with pytest.raises(ValueError, match=message):
        TextFileSource(path, **settings)


def test_broken_and_unknown_files_are_refused(tmp_path):
    """The message names the file or the line."""
    for name, text, settings, message in (
        ("rows.json", "{'a': 1", {}, "'rows.json' is no valid JSON"),
        ("rows.jsonl", '{"text": "x", "label": 0}\n{"text"', {}, "Line 2 is no valid JSON"),
        ("rows.txt", "x", {}, "'rows.txt' is no .json"),
        ("rows.csv", "text,label\nx,0\n", {"field": "train"}, "`field='train'` picks a key of a .json file"),
        ("short.csv", "text,label\nx\n", {}, "`label='label'` is missing in row 0"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            TextFileSource(tmp_path / name, **settings)


def test_clinc150():
    """The file as published: 150 intents in each part, numbered alike."""
    if not CLINC.is_file():
        pytest.skip("CLINC150 (../shared/data/clinc150/data_full.json) is not here")
    parts = {split: TextFileSource(CLINC, split) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [15_000, 3_000, 4_500]
    check_label_names(parts)
    assert [np.bincount(part.labels).tolist() for part in parts.values()] == [[100] * 150, [20] * 150, [30] * 150]
    raw = json.loads(CLINC.read_text(encoding="utf-8"))["train"]
    names = parts["train"].label_names
    assert [names[label] for label in parts["train"].labels] == [intent for _, intent in raw]
    ids, _ = parts["train"][0]
    assert (ids > 0).sum() == 15  # "what expression would i use to say i love you if i were an italian"
    outside = TextFileSource(CLINC, ["val", "oos_val"], label_field=["train", "oos_train"])
    assert len(outside.label_names) == 151


# ---------------------------------------------------------------- Hugging Face


def test_hf_source_of_files_directories_and_splits(hub_cache, tmp_path):
    """A file, a saved dataset and a saved dictionary of splits give the same samples."""
    rows = [{"x": [0.5 * row, 1.0], "label": row % 3, "site": "ab"[row % 2]} for row in range(6)]
    data = hub_cache.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    hub_cache.DatasetDict(train=data.select([0]), test=data).save_to_disk(tmp_path / "splits")
    sources = [
        HFSource(str(write_rows(tmp_path / "rows.jsonl", rows)), domain="site"),
        HFSource(str(write_rows(tmp_path / "rows.parquet", rows)), domain="site"),
        HFSource(str(tmp_path / "saved"), domain="site"),
        HFSource(str(tmp_path / "splits"), "test", domain="site"),
    ]
    for source in sources:
        assert len(source) == 6
        assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert source.domains.tolist() == ["a", "b"] * 3
        assert source.label_names is None
        batch = batch_reader(source)([5, 2])
        assert list(batch) == ["x", "label"]
        assert batch["x"].tolist() == [[2.5, 1.0], [1.0, 1.0]]
        assert torch.equal(batch["x"], torch.stack([source[5]["x"], source[2]["x"]]))
        assert pickle.loads(pickle.dumps(source))[3]["label"] == 0
    assert batch_reader(sources[0]).deterministic
    assert len(HFSource(str(tmp_path / "rows.jsonl"), "train[:50%]")) == 3
    assert list(HFSource(str(tmp_path / "saved"), columns=["label"])[0]) == ["label"]


def test_hf_source_of_texts(hub_cache, tmp_path):
    """Text becomes ids, names become numbers; another part gets the same label set by `label_names`."""
    path = str(write_rows(tmp_path / "rows.csv", ROWS[:3]))
    source = HFSource(path, text="text", max_length=3, tokenizer=HashTokenizer(vocab_size=100))
    assert (source.label_names, source.labels.tolist(), source.vocab_size) == (["bank", "greet"], [1, 0, 1], 100)
    batch = batch_reader(source)([0, 2])
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    hello, there = (1 + zlib.crc32(word) % 99 for word in (b"hello", b"there"))
    assert batch["input_ids"].tolist() == [[hello, there, 0], [hello, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 1]
    named = HFSource(path, label_names=["greet", "ask", "bank"])
    assert (named.label_names, named.labels.tolist()) == (["greet", "ask", "bank"], [0, 2, 0])
    tab = str(write_rows(tmp_path / "rows.tsv", ROWS[:3]))
    assert HFSource(tab).labels.tolist() == [1, 0, 1]


def test_hf_source_refuses(hub_cache, tmp_path):
    """The message names what there is."""
    path = str(write_rows(tmp_path / "rows.csv", ROWS))
    hub_cache.DatasetDict(train=hub_cache.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.txt").write_text("x", encoding="utf-8")
    for settings, message in (
        ({"path": path, "label": "y"}, r"has no columns \['y'\]; it has"),
        ({"path": path, "columns": ["x", "text"], "domain": "d"}, r"has no columns \['d', 'x'\]"),
        (
            {"path": path, "label_names": ["ask"]},
            r"`label_names` lacks labels of the column 'label': \['bank', 'greet'\]",
        ),
        ({"path": path, "max_length": 0}, "`max_length` must be at least 1"),
        ({"path": str(tmp_path / "splits"), "split": "dev"}, r"`split='dev'` is not in .*\['train'\]"),
        ({"path": str(tmp_path / "rows.txt")}, "`path` must end in one of"),
    ):
        with pytest.raises(ValueError, match=message):
            HFSource(**settings)
    numbers = str(write_rows(tmp_path / "numbers.csv", [{"x": 1, "label": 2}]))
    with pytest.raises(ValueError, match="`label_names` numbers a column of text, but 'label' is"):
        HFSource(numbers, label_names=["a"])


# ---------------------------------------------------------------- what users pass


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


class Lengthless(Dataset):
    def __getitem__(self, index):
        return index


class Duck:
    """Map-style without the base class, as some libraries have it."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index, index


def test_as_dataset_accepts():
    """Datasets pass through; arrays become sources."""
    for dataset in (TensorDataset(torch.zeros(2)), ArraySource(np.zeros(2)), Duck()):
        assert as_dataset(dataset) is dataset
    source = as_dataset((torch.zeros(3, 2), np.array([2, 0, 1])))
    assert source.labels.tolist() == [2, 0, 1]
    assert len(as_dataset(np.zeros((4, 2)))) == 4


def test_as_dataset_of_hugging_face(hub_cache):
    """The torch format is added where there is none, a split is picked, iterables are refused."""
    data = hub_cache.Dataset.from_dict({"x": [[1, 2], [3, 4]], "label": [0, 1]})
    assert batch_reader(as_dataset(data))([1, 0])["x"].tolist() == [[3, 4], [1, 2]]
    assert as_dataset(data, tensors=False) is data
    numpy_format = data.with_format("numpy")
    assert as_dataset(numpy_format) is numpy_format
    splits = hub_cache.DatasetDict(train=data, dev=data.select([1]))
    assert len(as_dataset(splits, "dev")) == 1
    with pytest.raises(ValueError, match=r"splits \['dev', 'train'\], got None"):
        as_dataset(splits)
    with pytest.raises(ValueError, match="`IterableDataset` is an iterable dataset"):
        as_dataset(data.to_iterable_dataset())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "`Endless` is an iterable dataset.*Pass a map-style dataset"),
        (Lengthless(), "`Lengthless` has no `__len__`"),
        (DataLoader(TensorDataset(torch.zeros(2))), "Got a `DataLoader`; pass its `dataset`"),
        (
            (np.zeros(2), np.zeros(2), np.zeros(2)),
            r"A tuple must hold two arrays .*\['ndarray', 'ndarray', 'ndarray'\]",
        ),
        (([0], [0]), "A tuple must hold two arrays"),
        ("ag_news", "got str. For data by name use `HFSource`"),
        ([1, 2], "Expected a map-style torch `Dataset`.*got list"),
        ({"train": 1}, "got dict"),
        (3, "got int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_as_dataset_refuses(data, message):
    """What cannot be split by index, and what is no data."""
    with pytest.raises(ValueError, match=message):
        as_dataset(data)


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"class_path": "ArraySource", "init_args": {"inputs": "x.npy", "labels": "y.npy"}}, [1, 0]),
        (
            {"class_path": "TextFileSource", "init_args": {"path": "rows.json", "text": "text", "max_length": 4}},
            [2, 1, 2, 0],
        ),
        (
            {
                "class_path": "TextFileSource",
                "init_args": {
                    "path": "pairs.json",
                    "field": ["a", "b"],
                    "text": 1,
                    "label": 0,
                    "tokenizer": {
                        "class_path": "lightning_cl.datamodules.sources.HashTokenizer",
                        "init_args": {"vocab_size": 9},
                    },
                },
            },
            [0, 1],
        ),
    ],
)
def test_sources_are_built_from_a_configuration(settings, expected, tmp_path):
    """The typed signatures are the schema of the command line; paths are relative to the working directory."""
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    np.save(tmp_path / "y.npy", np.array([1, 0]))
    write_rows(tmp_path / "rows.json", ROWS)
    write_rows(tmp_path / "pairs.json", {"a": [["p", "x"]], "b": [["q", "x"]]})
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Source)
    source = parser.instantiate(parser.parse_object({"source": settings})).source
    assert read_labels(source).tolist() == expected
    if "tokenizer" in settings["init_args"]:
        assert source.vocab_size == 9


def test_digits_and_hub_sources_are_built_from_a_configuration(hub_cache, tmp_path):
    """The optional packages are imported when the class is built, not before."""
    pytest.importorskip("sklearn", reason="needs the extra examples")
    path = str(write_rows(tmp_path / "rows.csv", ROWS))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=Source)
    parser.add_argument("--val", type=Source)
    built = parser.instantiate(
        parser.parse_object(
            {
                "train": {"class_path": "HFSource", "init_args": {"path": path, "text": "text", "domain": "site"}},
                "val": {"class_path": "DigitsSource", "init_args": {"split": "val"}},
            }
        )
    )
    assert read_column(built.train, "domain").tolist() == ["web", "app", "app", "web"]
    assert len(built.val) == 360
