"""The reference language model: its loss, its measures, its weights and where they come from."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from language import LLAMA, LORA, ListData, TokenRows, built, llama, token_stream
from lightning_cl import EWC, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.cli.main import main
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM, Quantization
from lightning_cl.report import read_records, write_report
from ranks import exit_codes
from toys import fit_stream, trainer, weights

pytest.importorskip("transformers")


def nll(module: CausalLM, data: TokenRows) -> tuple[float, float, int]:
    """Return the negative log-likelihood of a dataset, how many of its tokens are predicted, and their number."""
    total, right, count = 0.0, 0, 0
    for row in range(len(data)):
        length = int(data.attention_mask[row].sum())
        ids = data.input_ids[row, :length]
        with torch.no_grad():
            logits = module(input_ids=ids[None])[0, :-1]
        total += float(cross_entropy(logits.double(), ids[1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[1:]).sum())
        count += length - 1
    return total, right, count


# ---------------------------------------------------------------------- loss


@pytest.mark.parametrize("labels", [False, True], ids=["from the inputs", "given"])
def test_the_loss_is_that_of_transformers(labels: bool) -> None:
    """With padding, and with labels that leave out a prompt."""
    module, batch = built(llama()), TokenRows(1, padded=True).batch()
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if labels:
        expected[:, :2] = -100
        batch["labels"] = expected
    theirs = module.network(**{**batch, "labels": expected})
    assert torch.equal(module._loss(batch)[0], theirs.loss)
    # which training has no use for
    assert theirs.past_key_values is None
    assert torch.equal(module(**{k: v for k, v in batch.items() if k != "labels"}), theirs.logits)


def test_padding_changes_nothing() -> None:
    """Neither its amount nor what stands in it."""
    module, batch = built(llama()), TokenRows(1, padded=True).batch()
    longer = {name: torch.cat([value, torch.zeros(12, 3, dtype=value.dtype)], 1) for name, value in batch.items()}
    longer["input_ids"] = longer["input_ids"].masked_fill(longer["attention_mask"] == 0, 9)
    torch.testing.assert_close(module._loss(longer)[0], module._loss(batch)[0])


def test_a_batch_without_a_supervised_token_teaches_nothing() -> None:
    """Its loss and its gradients are 0, not NaN."""
    module, batch = built(llama()), TokenRows(1).batch()
    loss = module._loss({**batch, "labels": torch.full_like(batch["input_ids"], -100)})[0]
    loss.backward()
    assert loss == 0
    assert all(bool((parameter.grad == 0).all()) for parameter in module.parameters() if parameter.grad is not None)


def test_bfloat16_logits_make_a_float32_loss() -> None:
    """As in transformers."""
    module = built(llama(dtype="bfloat16"))
    loss = module._loss(TokenRows(1).batch())[0]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert loss.dtype == torch.float32


# ---------------------------------------------------------------------- measures


def test_perplexity_and_accuracy_of_every_domain_after_every_task(tmp_path: Path) -> None:
    """Over tokens, in uneven batches of padded rows: the matrix, a further one and the summary."""
    metrics = ContinualMetrics("val_perplexity", mode="min", further=["val_acc"], directory=tmp_path)
    module, rows = llama(learning_rate=1e-2), []

    class Expected(ContinualMetrics):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                rows.append([nll(pl_module, TokenRows(step, 7, padded=True, seed=1)) for step in (1, 3)])

    stream = token_stream(evaluate="all", epochs_per_task=10)
    fit_stream(tmp_path, [metrics, Expected("val_loss")], module=module, stream=stream)
    perplexities = [[math.exp(total / count) for total, _, count in row] for row in rows]
    assert metrics.matrix.tolist() == [pytest.approx(row, rel=1e-5) for row in perplexities]
    record = read_records([tmp_path])[0]
    assert record.further["val_acc"] == [[pytest.approx(right / count) for _, right, count in row] for row in rows]
    assert record.better == "lower"
    assert record.summary["average_accuracy"] == pytest.approx(sum(perplexities[1]) / 2, rel=1e-5)
    # counting by threes raised what counting by ones had reached
    assert record.summary["forgetting"] == pytest.approx(perplexities[1][0] - perplexities[0][0], rel=1e-4)
    assert record.summary["forgetting"] > 1
    assert record.summary["backward_transfer"] == pytest.approx(-record.summary["forgetting"])


def test_test_and_validation_loops_measure_alike(tmp_path: Path) -> None:
    """One loader or two, with the loss beside the perplexity."""
    module, data = llama(), TokenRows(1, 7, padded=True, seed=1)
    run = trainer(tmp_path)
    run.test(module, datamodule=token_stream(), verbose=False)
    total, right, count = nll(module, data)
    assert run.callback_metrics["test_perplexity/dataloader_idx_0"] == pytest.approx(math.exp(total / count), rel=1e-5)
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    (logged,) = run.validate(module, loader, verbose=False)
    assert logged["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert logged["val_acc"] == pytest.approx(right / count)


def measure_on_ranks(root: Path) -> None:
    """Validate on two ranks with unlike numbers of rows, and save what rank 0 logged."""
    run = trainer(root, devices=2, strategy="ddp")
    (logged, _) = run.validate(llama(), datamodule=token_stream(), verbose=False)
    torch.save(logged, root / f"logged-{run.global_rank}.pt")


@pytest.mark.distributed
def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    """Seven padded rows on two ranks: the mean over tokens, not over rows, batches or ranks."""
    assert exit_codes(functools.partial(measure_on_ranks, tmp_path), world_size=2) == [0, 0]
    total, right, count = nll(built(llama()), TokenRows(1, 7, padded=True, seed=1))
    for rank in range(2):
        logged = torch.load(tmp_path / f"logged-{rank}.pt")
        assert logged["val_perplexity/dataloader_idx_0"] == pytest.approx(math.exp(total / count), rel=1e-6)
        assert logged["val_acc/dataloader_idx_0"] == pytest.approx(right / count, rel=1e-6)


# ---------------------------------------------------------------------- weights


def test_weights_depend_on_the_seed_alone() -> None:
    """Not on the generators of the process, which are left alone."""
    before = torch.get_rng_state()
    first = weights(built(llama(adapter=LORA)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(weights(built(llama(adapter=LORA))), first)
    assert not torch.equal(weights(built(llama(adapter=LORA, seed=1))), first)


def test_random_weights_follow_the_rule_of_the_architecture() -> None:
    """Norms are 1, matrices have the standard deviation of the config, and no two layers are alike."""
    module = built(llama())
    assert module.network.model.norm.weight.eq(1).all()
    query = [layer.self_attn.q_proj.weight for layer in module.network.model.layers]
    assert torch.stack(query).std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(*query)


def test_tied_weights_stay_tied() -> None:
    """One parameter for embeddings and head."""
    network = built(CausalLM({**LLAMA, "tie_word_embeddings": True})).network
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_from_a_folder(tmp_path: Path) -> None:
    """What ``save_pretrained`` wrote, in the dtype asked for."""
    saved = built(llama(seed=3))
    saved.network.save_pretrained(tmp_path)
    loaded = built(CausalLM(str(tmp_path)))
    assert torch.equal(weights(loaded), weights(saved))
    assert loaded.network.training
    assert next(built(CausalLM(str(tmp_path), dtype="bfloat16")).parameters()).dtype == torch.bfloat16


def test_from_a_config_object() -> None:
    """A dict and a ``PretrainedConfig`` make the same model."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "model_type"})
    assert torch.equal(weights(built(CausalLM(config))), weights(built(llama())))


def test_only_the_adapter_trains(tmp_path: Path) -> None:
    """LoRA's factors move, the base does not, and EWC and replay work on the factors alone."""
    module, fresh = llama(adapter=LORA, learning_rate=1e-2), built(llama(adapter=LORA))
    ewc = EWC(10.0)
    fit_stream(tmp_path, [ewc, ExperienceReplay(4)], module=module, stream=token_stream())
    before = dict(fresh.named_parameters())
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    trainable = {name for name, value in module.named_parameters() if value.requires_grad}
    assert moved == trainable
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in name for name in trainable)
    assert set(ewc.state_dict()["anchors"]) == trainable


def test_a_quantized_base_trains_its_adapter(tmp_path: Path) -> None:
    """From a folder and from a config: the same packed weights, which stay, and a loss that falls."""
    pytest.importorskip("bitsandbytes")
    wide = {**LLAMA, "hidden_size": 64}
    built(CausalLM(wide)).network.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"adapter": LORA, "quantization": Quantization(), "learning_rate": 1e-2}
    one, two = (built(CausalLM(model, **settings)) for model in (str(tmp_path / "base"), wide))
    batch = TokenRows(1).batch()
    assert torch.equal(one(**batch), two(**batch))
    packed = one.network.base_model.model.model.layers[0].mlp.up_proj.weight
    assert packed.numel() * packed.element_size() == 64 * 64 // 2
    # as bytes, some of which are NaN as numbers
    copy, before = packed.view(torch.uint8).clone(), one._loss(batch)[0]
    fit_stream(tmp_path, module=one, stream=token_stream(epochs_per_task=[8, 1]))
    assert torch.equal(packed.view(torch.uint8), copy)
    assert one._loss(batch)[0] < before


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_load_from_checkpoint(kind: str, tmp_path: Path) -> None:
    """With hyperparameters that are plain values, though the model was given objects."""
    from peft import LoraConfig
    from transformers import LlamaConfig

    config = LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "model_type"})
    adapter = LoraConfig(r=4, target_modules=["q_proj"]) if kind == "adapter" else None
    module = CausalLM(config, adapter=adapter, tokenizer="bytes", learning_rate=1e-2)
    run = trainer(tmp_path)
    run.fit(module, datamodule=token_stream())
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(weights(loaded), weights(module))
    assert loaded.learning_rate == 1e-2


def test_a_config_of_the_command_line(tmp_path: Path) -> None:
    """A model from a config with LoRA, all of it typed in YAML; its checkpoint loads without the command line."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "default_root_dir": str(tmp_path),
                    "max_epochs": 1,
                    "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}}],
                },
                "model": {
                    "class_path": "CausalLM",
                    "init_args": {
                        "model": LLAMA,
                        "adapter": LORA,
                        "learning_rate": 0.01,
                        "betas": [0.9, 0.98],
                        "warmup": 1,
                        "schedule": "linear",
                    },
                },
                "data": {"class_path": "language.TokenData"},
            }
        )
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    path = next(tmp_path.glob("*.ckpt"))
    module = CausalLM.load_from_checkpoint(path, weights_only=True)
    trained = torch.load(path, weights_only=True)["state_dict"]
    assert trained.keys() == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in trained.items())
    assert (module.betas, module.schedule.warmup, module.schedule.shape) == ((0.9, 0.98), 1, "linear")


# ---------------------------------------------------------------------- samples


def test_generation_is_greedy() -> None:
    """Of prompts of unlike length in one batch: what transformers writes for each alone."""
    module = built(llama())
    data = TokenRows(1, 3, padded=True)
    new = module.generate(data.input_ids, data.attention_mask, 5)
    for row in range(3):
        prompt = data.input_ids[row : row + 1, : int(data.attention_mask[row].sum())]
        theirs = module.network.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert theirs[0, prompt.shape[1] :].tolist() == new[row].tolist()


def test_samples_stand_in_record_and_report(tmp_path: Path) -> None:
    """After every task, escaped; a module that learned to repeat a text writes it."""
    pytest.importorskip("matplotlib")
    text = "<b>tick</b> tock "
    wide = {**LLAMA, "vocab_size": 259}
    module = CausalLM(wide, tokenizer="bytes", prompts=["<b>tick"], max_new_tokens=10, learning_rate=1e-2)
    metrics = ContinualMetrics("val_perplexity", mode="min", directory=tmp_path)
    rows = torch.tensor([[byte + 3 for byte in (text * 3).encode()]] * 4)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    stream = TaskStreamDataModule(
        [ListData(data)] * 2, [ListData(data)] * 2, scenario=Predefined(["<i>", "b"]), batch_size=4, epochs_per_task=40
    )
    fit_stream(tmp_path, [metrics], module=module, stream=stream)
    module.train()
    assert module.generate_samples() == {"<b>tick": "</b> tock "}
    assert all(part.training for part in module.modules())
    record = read_records([tmp_path])[0]
    assert record.samples[1] == {"<b>tick": "</b> tock "}
    page = write_report([record], tmp_path / "report").read_text(encoding="utf-8")
    assert "<q>&lt;b&gt;tick</q>" in page
    assert page.count("<td>&lt;/b&gt; tock </td>") == 1 + (record.samples[0] == record.samples[1])
    assert "<b>tick" not in page
    assert "lower is better" in page


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": {"mode": "nf4"}}, "no `adapter` to train"),
        ({"prompts": ["a"]}, "`prompts` needs a `tokenizer`"),
        ({"prompts": ["a"], "tokenizer": "hash"}, "cannot be read back"),
        ({"dtype": "float8"}, "`dtype` must be one of"),
        ({"schedule": "step"}, "`schedule` must be one of"),
        ({"warmup": 1.5}, "`warmup` must be a number of steps"),
        ({"floor": 2.0}, "`floor` is a fraction"),
        ({"learning_rate": 0}, "`learning_rate` must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    """Refused when the module is made, with the setting's name."""
    with pytest.raises(ValueError, match=message):
        llama(**arguments)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    """A config without its type, a folder without a model, and what is no model at all."""
    with pytest.raises(ValueError, match="needs a `model_type`"):
        CausalLM({"hidden_size": 8})
    with pytest.raises(ValueError, match="is neither a folder with"):
        built(CausalLM(str(tmp_path)))
    with pytest.raises(ValueError, match="must be a folder, a hub name"):
        CausalLM(3)


class AlreadyShifted(CausalLM):
    """The same network on labels that stand at the position that predicts them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(input_ids=batch["input_ids"])
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def test_sampled_fisher_counts_the_positions_that_predict_a_label(tmp_path: Path) -> None:
    """A prompt is masked: the position before the first supervised token counts, the last token's does not."""
    rows = TokenRows(1, 6)
    labels = rows.input_ids.clone()
    labels[:, :3] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((6, 1), -100)], dim=1)
    found = []
    for kind, target in ((CausalLM, labels), (AlreadyShifted, shifted)):
        samples = [{"input_ids": row, "labels": label} for row, label in zip(rows.input_ids, target, strict=True)]
        stream = TaskStreamDataModule([ListData(samples)], scenario=Predefined(), batch_size=3)
        ewc = EWC(1.0, fisher="sampled")
        module = kind(dict(LLAMA), learning_rate=1e-9)
        trainer(tmp_path, [ewc], limit_val_batches=0).fit(module, datamodule=stream)
        found.append(ewc.state_dict()["importance"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-10)
