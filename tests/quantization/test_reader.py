"""Checkpoints are read tensor by tensor, and written so."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_cl.quantization import CheckpointReader
from lightning_cl.quantization.writer import CheckpointWriter, Planned
from llamas import save_llama, tiny_llama


def test_tensors_are_those_of_the_files(tmp_path):
    """Of a checkpoint in several files, in every dtype that it may hold."""
    expected = dict(tiny_llama().state_dict())
    reader = CheckpointReader(save_llama(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert sorted(reader.names()) == sorted(expected)
    assert all(torch.equal(reader.read(name), value) for name, value in expected.items())
    name = "model.layers.1.mlp.down_proj.weight"
    assert name in reader
    assert (reader.shape(name), reader.nbytes(name)) == ((64, 128), 64 * 128 * 4)
    assert torch.equal(torch.cat(list(reader.rows(name, 10))), expected[name])
    assert reader.names("model.layers.1.mlp") == [n for n in reader.names() if n.startswith("model.layers.1.mlp.")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_dtypes(dtype, tmp_path):
    """A tensor keeps its dtype; an empty one and a scalar are read too."""
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "b": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for name, value in tensors.items():
        assert reader.read(name).dtype == dtype
        assert torch.equal(reader.read(name), value)


def test_ignored_tensors_are_not_named(tmp_path):
    """What the model need not take, and what it computes itself."""
    tensors = {"w": torch.ones(1), "lm_head.weight": torch.ones(1), "model.rotary_emb.inv_freq": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path, ignore=["lm_head.*"]).names() == ["w"]


def test_damaged_checkpoints_are_refused(tmp_path):
    """A folder without safetensors, a missing shard, a file that was cut off, a file of another kind."""
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        CheckpointReader(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="shorter than its header says"):
        CheckpointReader(tmp_path)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        CheckpointReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \['model-1.safetensors'\].*incomplete"):
        CheckpointReader(tmp_path)


def test_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """No tensor with whatever memory held."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, file)
    reader = CheckpointReader(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="ends in the middle of a tensor"):
        reader.read("w")


def hub(monkeypatch, cache):
    """Let the hub be a folder, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))


def test_name_on_the_hub_is_found_in_the_cache(tmp_path, monkeypatch):
    """Without a network, in the layout of the hub's cache."""
    hub(monkeypatch, tmp_path)
    (tmp_path / "models--ada--llama" / "refs").mkdir(parents=True)
    (tmp_path / "models--ada--llama" / "refs" / "main").write_text("0" * 40)
    save_llama(tmp_path / "models--ada--llama" / "snapshots" / ("0" * 40))
    assert sorted(CheckpointReader("ada/llama").names()) == sorted(tiny_llama().state_dict())


def test_name_that_is_nowhere_is_a_clear_error(tmp_path, monkeypatch):
    """It says what to do without a network."""
    hub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)'ada/nothing' is no folder.*give the path of a folder"):
        CheckpointReader("ada/nothing")


# ---------------------------------------------------------------------- writing


def test_written_files_load_in_safetensors(tmp_path):
    """In one file, or in shards with an index."""
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16(), "d": torch.ones(())}
    planned = [Planned(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    for folder, size in ((tmp_path / "one", 10**6), (tmp_path / "many", 50)):
        with CheckpointWriter(folder, planned, size) as writer:
            for name, value in tensors.items():
                writer.write(name, value)
        files = sorted(folder.glob("*.safetensors"))
        loaded = {name: value for file in files for name, value in load_file(file).items()}
        assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
        assert sorted(CheckpointReader(folder).names()) == sorted(tensors)
    assert len(files) == 3


def write(folder, planned, names):
    """Write zeros under the names, where others may be planned."""
    with CheckpointWriter(folder, planned, 10**6) as writer:
        for name in names:
            writer.write(name, torch.zeros(2))


def test_interrupted_write_leaves_nothing_to_load(tmp_path):
    """An error in the middle leaves what was there before; a tensor that does not come is an error."""
    planned = [Planned("a", torch.float32, (2,)), Planned("b", torch.float32, (2,))]
    with CheckpointWriter(tmp_path, planned[:1], 10**6) as writer:
        writer.write("a", torch.ones(2))
    for names, message in (
        (["a", "bad"], "came where"),
        (["a"], "1 tensors that were planned did not come"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, planned, names)
    assert torch.equal(CheckpointReader(tmp_path).read("a"), torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
