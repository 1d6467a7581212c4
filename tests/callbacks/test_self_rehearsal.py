"""Own answers in the place of gold ones: against a plain loop, after a kill, on two ranks, and what is refused."""

from __future__ import annotations

import functools
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgetting import differing, learned_and_forgotten
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from lightning_cl import ExperienceReplay, FSDP2Strategy, SelfRehearsal, TaskStreamDataModule
from lightning_cl.callbacks import ExactMatch
from lightning_cl.callbacks.answers import AnswerFile, Generated
from lightning_cl.cli.main import main
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import InstructionSource, PackedTextSource, Predefined
from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.datamodules.sources import ByteTokenizer
from lightning_cl.modules import CausalLM
from ranks import Ranks, exit_codes
from toys import ToyModule, fit_stream, toy_stream, trainer, trainer_yaml, weights

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY, WIDTH, ROWS, NEW = 259, 12, 12, 6
STOP = list(range(2, VOCABULARY, 4))
REWORD = "{response}; "
TEXT = ByteTokenizer()


class Killed(Exception):
    """What a judge throws into a run."""


class Half:
    """Accepts about half of all answers, whatever they say; dies at the question after the last it may be asked."""

    def __init__(self, questions: float = float("inf")) -> None:
        self.left = questions
        self.asked: list[tuple[str, str, str]] = []

    def __repr__(self) -> str:
        return "Half()"

    def __call__(self, prompt: str, gold: str, own: str) -> bool:
        if len(self.asked) == self.left:
            raise Killed
        self.asked.append((prompt, gold, own))
        return zlib.crc32(f"{prompt}/{gold}/{own}".encode("utf-8", "surrogatepass")) % 2 == 0


class Examples(Dataset[dict[str, Tensor]]):
    """Random prompts and answers of unlike lengths, padded on the right."""

    def __init__(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        self.input_ids = torch.randint(3, VOCABULARY, (ROWS, WIDTH), generator=generator)
        prompts = torch.randint(2, 6, (ROWS, 1), generator=generator)
        lengths = prompts + torch.randint(1, 6, (ROWS, 1), generator=generator)
        places = torch.arange(WIDTH)
        self.attention_mask = (places < lengths).long()
        self.input_ids *= self.attention_mask
        self.labels = self.input_ids.masked_fill((places < prompts) | (places >= lengths), -100)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: getattr(self, name)[index] for name in ("input_ids", "attention_mask", "labels")}


class UserModule(LightningModule):
    """A module as users write them around a model of transformers."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = transformers.LlamaConfig(vocab_size=VOCABULARY, attention_dropout=dropout, **SIZES)
            self.model = transformers.LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def counted(module: UserModule) -> tuple[UserModule, list[int]]:
    """Return the module, and a list that grows by the prompts of each call of ``generate``."""
    generate, sizes = module.model.generate, []

    def counting(input_ids: Tensor, **settings: Any) -> Tensor:
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **settings)

    module.model.generate = counting
    return module, sizes


def examples_stream(batch_size: int = 4, **settings: Any) -> TaskStreamDataModule:
    """Two tasks of twelve examples, two epochs each."""
    defaults: dict[str, Any] = {"scenario": Predefined(), "batch_size": batch_size, "epochs_per_task": 2}
    return TaskStreamDataModule([Examples(0), Examples(1)], [Examples(2), Examples(3)], **(defaults | settings))


def method(**settings: Any) -> SelfRehearsal:
    """The callback as most tests use it."""
    defaults: dict[str, Any] = {"tokenizer": "bytes", "max_new_tokens": NEW, "stop": STOP, "batch_size": 5}
    return SelfRehearsal(**({"judge": Half()} | defaults | settings))


def fit(root: Path, *callbacks: Any, module: LightningModule | None = None, **settings: Any) -> Tensor:
    """Fit the stream and return the final weights."""
    return fit_stream(root, callbacks, module=module or UserModule(), stream=examples_stream(), **settings)


# ---------------------------------------------------------------------- a plain loop


def answered(model: Any, prompt: Tensor) -> Tensor | None:
    """Return the likeliest next tokens up to one that ends an answer, each by a forward over the whole text."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1:].argmax(-1)])
            if int(ids[-1]) in STOP:
                return ids[len(prompt) :]
    return None


def plain_targets(model: Any, data: Examples, paraphrase: bool) -> list[tuple[Tensor, Tensor]]:
    """Return prompt and target of each sample."""

    def text(ids: Tensor) -> str:
        return TEXT.decode(ids[:-1] if int(ids[-1]) in STOP else ids)

    def good(prompt: Tensor, gold: Tensor, found: Tensor | None) -> bool:
        return found is not None and len(found) > 1 and Half()(text(prompt), text(gold), text(found))

    targets = []
    for ids, labels in zip(data.input_ids, data.labels, strict=True):
        supervised = labels != -100
        prompt, gold = ids[: int(supervised.long().argmax())], ids[supervised]
        target = answered(model, prompt)
        if not good(prompt, gold, target) and paraphrase:
            words = TEXT.encode([REWORD.replace("{response}", text(gold))], 100)
            target = answered(model, torch.from_numpy(words[0])[torch.from_numpy(words[1]).bool()])
        targets.append((prompt, target if good(prompt, gold, target) else gold))
    return targets


@functools.cache
def plain_loop(paraphrase: bool, world_size: int = 1) -> Tensor:
    """Both tasks in plain torch; the gradient is the mean over the ranks, four rows a step over all of them."""
    module = UserModule()
    for task in range(2):
        targets = plain_targets(module.model.eval(), Examples(task), paraphrase)
        rows = np.arange(ROWS) + task * ROWS
        sampler = TaskSampler(rows, task=task, batch_size=4 // world_size, seed=0, world_size=world_size)
        for epoch in range(2):
            sampler.set_position(epoch=epoch)
            for step in range(len(sampler)):
                losses = []
                for mine in sampler.global_rows(step) - task * ROWS:
                    chosen = [targets[row] for row in mine]
                    sums = [tokens_loss(module.model, *pair) for pair in chosen]
                    losses.append(sum(sums) / sum(len(target) for _, target in chosen))
                module.zero_grad()
                (sum(losses) / world_size).backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= module.learning_rate * parameter.grad
    return weights(module)


def tokens_loss(model: Any, prompt: Tensor, target: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of a target, without padding."""
    logits = model(input_ids=torch.cat([prompt, target])[None]).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


PARAPHRASES = pytest.mark.parametrize("paraphrase", [None, REWORD], ids=["own answers", "paraphrases too"])


@PARAPHRASES
def test_ends_where_a_plain_loop_ends(paraphrase: str | None, tmp_path: Path) -> None:
    """Over two tasks; each task is answered by the model as the one before left it."""
    callback = method(paraphrase=paraphrase)
    found = fit(tmp_path, callback)
    torch.testing.assert_close(found, plain_loop(paraphrase is not None), rtol=0, atol=1e-6)
    assert [counts[:2] for counts in callback.counts] == [(0, ROWS), (1, ROWS)]
    assert all(0 < own < ROWS for _, _, own, _ in callback.counts)
    assert any(again for *_, again in callback.counts) == (paraphrase is not None)
    assert (found - fit(tmp_path)).abs().max() > 1e-2


def test_groups_of_prompts_change_nothing(tmp_path: Path) -> None:
    """One prompt at a time, or all at once with padding: the same answers."""
    one, all_at_once = (fit(tmp_path / str(size), method(batch_size=size)) for size in (1, 100))
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-6)


def test_nothing_accepted_is_fine_tuning(tmp_path: Path) -> None:
    """To the bit, with dropout: generation leaves no trace in weights, modes or random numbers."""
    none = method(judge=lambda *texts: False)
    torch.manual_seed(0)
    found = fit(tmp_path, none, module=UserModule(dropout=0.3))
    torch.manual_seed(0)
    assert torch.equal(found, fit(tmp_path, module=UserModule(dropout=0.3)))
    assert none.counts == [(0, ROWS, 0, 0), (1, ROWS, 0, 0)]


def test_answers_are_made_without_dropout(tmp_path: Path) -> None:
    """In evaluation mode, whatever the mode of the step."""
    dropped, whole = Half(), Half()
    fit(tmp_path, method(judge=dropped), module=UserModule(dropout=0.9), limit_train_batches=1)
    fit(tmp_path, method(judge=whole), limit_train_batches=1)
    assert dropped.asked[:2] == whole.asked[:2]


def test_judge_reads_texts(tmp_path: Path) -> None:
    """Without a tokenizer the texts are ids with blanks between; the end of an answer is no part of them."""
    seen: list[tuple[str, ...]] = []

    def read(*texts: str) -> bool:
        seen.append(texts)
        return True

    callback = method(judge=read, tokenizer=None)
    fit(tmp_path, callback)
    ids = Examples(0).input_ids
    assert [int(token) for token in seen[0][0].split()] == ids[0, : len(seen[0][0].split())].tolist()
    assert all(int(text[2].split()[-1]) not in STOP for text in seen)
    assert sum(own for _, _, own, _ in callback.counts) == len(seen)


def test_answers_without_an_end_are_not_taken(tmp_path: Path) -> None:
    """Nor is an answer that is nothing but an end."""
    callback = method(judge=lambda *texts: True, stop=[VOCABULARY - 1])
    plain = fit(tmp_path)
    assert torch.equal(fit(tmp_path, callback), plain)
    every = method(judge=lambda *texts: True, stop=list(range(VOCABULARY)))
    assert torch.equal(fit(tmp_path, every), plain)


# ---------------------------------------------------------------------- resume


def saver(directory: Path, **settings: Any) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, **settings)


@pytest.mark.parametrize("step", [2, 6, 9], ids=["first task", "boundary", "second task"])
def test_resumes_to_the_same_bits(step: int, tmp_path: Path) -> None:
    """From a checkpoint at any step, with dropout and sampled answers; inside a task nothing is generated anew."""
    settings: dict[str, Any] = {"generation": {"do_sample": True, "temperature": 2.0}}
    through = method(**settings)
    straight = fit(tmp_path, through, saver(tmp_path), module=UserModule(dropout=0.3))
    torch.manual_seed(999)
    again = method(**settings)
    module = UserModule(dropout=0.3)
    resumed = trainer(tmp_path, [again, saver(tmp_path / "resumed")])
    resumed.fit(module, datamodule=examples_stream(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
    assert torch.equal(weights(module), straight)
    assert again.counts == through.counts
    assert bool(again.judge.asked) == (step <= 6)


def test_checkpoints_without_answers_are_refused(tmp_path: Path) -> None:
    """Of a run without the callback, and of weights alone."""
    fit(tmp_path, saver(tmp_path / "plain"))
    with pytest.raises(ValueError, match="no state for SelfRehearsal"):
        fit(tmp_path, method(), saver(tmp_path / "plain"), ckpt_path=tmp_path / "plain" / "step=8.ckpt")
    fit(tmp_path, method(), saver(tmp_path / "weights", save_weights_only=True))
    with pytest.raises((ValueError, KeyError), match=r"no state for|save_weights_only"):
        fit(tmp_path, method(), ckpt_path=tmp_path / "weights" / "step=8.ckpt")


def test_survives_pickling(tmp_path: Path) -> None:
    """Before a fit and after it."""
    callback = pickle.loads(pickle.dumps(method()))
    found = fit(tmp_path, callback)
    assert torch.equal(found, fit(tmp_path, method()))
    assert pickle.loads(pickle.dumps(callback)).counts == callback.counts


@PARAPHRASES
@pytest.mark.parametrize("task", [0, 1])
def test_generation_goes_on_where_it_was_killed(task: int, paraphrase: str | None, tmp_path: Path) -> None:
    """In the first task or the second: answers that stand in the files are not made again, a cut line is."""
    settings = {"batch_size": 2, "cache_directory": tmp_path / "answers", "paraphrase": paraphrase}
    module, whole = counted(UserModule())
    uncut = Half()
    straight = fit(tmp_path, method(judge=uncut, batch_size=2, paraphrase=paraphrase), module=module)
    module, before = counted(UserModule())
    # early in the first task, or near the end of the second
    questions = len(uncut.asked) - 3 if task else 3
    with pytest.raises(Killed):
        fit(tmp_path, method(judge=Half(questions), **settings), saver(tmp_path / "killed"), module=module)
    files = sorted(settings["cache_directory"].iterdir())
    with files[-1].open("a") as file:
        file.write('{"sample": 1')
    last = tmp_path / "killed" / "step=6.ckpt"
    assert last.is_file() == (task == 1)
    module, after = counted(UserModule())
    again = method(**settings)
    resumed = fit(
        tmp_path, again, saver(tmp_path / "killed"), module=module, ckpt_path=last if last.is_file() else None
    )
    assert torch.equal(resumed, straight)
    assert 0 < len(before) < len(whole)
    assert sum(before) + sum(after) == sum(whole)
    module, none = counted(UserModule())
    assert torch.equal(fit(tmp_path, method(**settings), module=module), straight)
    assert not none


@PARAPHRASES
def test_another_judge_reads_the_files_and_decides_anew(paraphrase: str | None, tmp_path: Path) -> None:
    """Files are of what was generated: a judge with the same name gives what it gives without files."""

    class Threshold(Half):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def __call__(self, *texts: str) -> bool:
            return zlib.crc32("/".join(texts).encode("utf-8", "surrogatepass")) % 100 < 100 * self.share

    settings = {"cache_directory": tmp_path / "answers", "paraphrase": paraphrase}
    found, known = [], []
    for share in (1.0, 0.0, 0.5):
        module, made = counted(UserModule())
        cached = method(judge=Threshold(share), **settings)
        fit(tmp_path, cached, module=module, limit_train_batches=1)
        alone = method(judge=Threshold(share), paraphrase=paraphrase)
        fit(tmp_path, alone, limit_train_batches=1)
        assert cached.counts == alone.counts
        found.append(cached.counts[0])
        known.append(sum(made))
    assert found[0][2] > found[2][2] > found[1][2] == 0
    # weights of the second task are others with each judge
    first = sorted(path for path in (tmp_path / "answers").glob("task-0-*"))
    assert len(first) == 1


def test_purge_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither in files, cut lines included, nor in a later checkpoint; the others keep their answers."""
    folder = tmp_path / "answers"
    callback = method(judge=lambda *texts: True, cache_directory=folder)
    fit(tmp_path, callback)
    # the longest one, whose tokens stand nowhere else
    gone = int(callback._answers.sample_ids[callback._answers.lengths.argmax()])
    stays = [sample for sample in callback._answers.sample_ids.tolist() if sample != gone]
    (secret,) = callback._answers.of(torch.tensor([gone]))
    kept = callback._answers.of(torch.tensor(stays))
    needles = [str(secret.tolist()).encode(), np.asarray(secret, dtype=np.int32).tobytes()]
    with (folder / "task-9-old-rank3.jsonl").open("w") as file:
        file.write(f'{{"sample": {gone}, "check": 1, "own": {secret.tolist()}, "par')

    def held(path: Path) -> bool:
        return any(needle in path.read_bytes() for needle in needles)

    def saved() -> Path:
        torch.save(callback.state_dict(), tmp_path / "state.pt", _use_new_zipfile_serialization=False)
        return tmp_path / "state.pt"

    assert held(saved())
    assert sum(map(held, folder.iterdir())) == 2
    lines = sum(len(path.read_text().splitlines()) for path in folder.iterdir())
    assert callback.purge(torch.tensor([gone, 999])) == 1
    assert not held(saved())
    assert not any(map(held, folder.iterdir()))
    assert sum(len(path.read_text().splitlines()) for path in folder.iterdir()) == lines - 2
    assert callback._answers.of(torch.tensor([gone])) == [None]
    assert all(
        torch.equal(one, other) for one, other in zip(kept, callback._answers.of(torch.tensor(stays)), strict=True)
    )
    assert callback.purge(torch.tensor(stays)) == len(stays)
    assert callback.purge(torch.tensor(stays)) == 0
    assert method(cache_directory=tmp_path / "none").purge(torch.tensor([1])) == 0
    assert SelfRehearsal.card.stores_inputs


@pytest.mark.parametrize("cached", [False, True])
def test_a_request_leaves_no_answers(cached: bool, tmp_path: Path) -> None:
    """Those to its samples go, and those to others too, which earlier weights gave; files keep the latter."""
    callback = method(cache_directory=tmp_path / "answers" if cached else None)
    request = ForgetRequest("rows", rows=list(range(6)), after=1)
    stream = examples_stream(requests=[request])
    serves = learned_and_forgotten(tmp_path, callback, module=UserModule(), stream=stream)
    found = [(i.state, i.outcome, i.count) for i in serves.influences if i.owner == "SelfRehearsal"]
    assert [entry[:2] for entry in found] == [
        ("answers to the samples", "removed"),
        ("answers to other samples", "removed"),
        *([("answers to other samples, in `cache_directory`", "remains")] if cached else []),
    ]
    assert sum(entry[2] or 0 for entry in found) == sum(callback.counts[0][2:]) > (found[1][2] or 0) > 0
    assert differing(serves.before, serves.after) == []
    lines = [json.loads(line) for path in tmp_path.rglob("task-0-*") for line in path.read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == (list(range(6, 12)) if cached else [])


def test_files_belong_to_weights_data_and_settings(tmp_path: Path) -> None:
    """With other weights or other generation the answers are made anew, also by the model's own settings."""
    folder = tmp_path / "answers"
    fit(tmp_path, method(cache_directory=folder))
    assert len(list(folder.iterdir())) == 2
    other = UserModule()
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    fit(tmp_path, method(cache_directory=folder), module=other)
    assert len(list(folder.iterdir())) == 4
    fit(tmp_path, method(cache_directory=folder, judge=ExactMatch()))
    # the same answers of the first task, but learned otherwise: the weights of the second are new ones
    assert len(list(folder.iterdir())) == 5
    fit(tmp_path, method(cache_directory=folder, max_new_tokens=NEW + 1))
    assert len(list(folder.iterdir())) == 7
    penalised = UserModule()
    penalised.model.generation_config.repetition_penalty = 1.5
    fit(tmp_path, method(cache_directory=folder), module=penalised)
    assert len(list(folder.iterdir())) == 9


def test_files_know_the_prompt_and_the_gold_answer(tmp_path: Path) -> None:
    """An identity may stand for another sample in another run."""
    prompt, gold, answer = torch.tensor([5, 6]), torch.tensor([7]), Generated((8, 2))
    AnswerFile(tmp_path, "task").write([(1, prompt, gold, answer, "x")])
    again = AnswerFile(tmp_path, "task")
    assert again.known(1, prompt, gold) == answer
    assert again.known(1, prompt, gold + 1) is None
    assert again.known(1, prompt + 1, gold) is None
    assert again.known(2, prompt, gold) is None
    assert AnswerFile(tmp_path, "other").known(1, prompt, gold) is None


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: FSDP2Strategy(wrap=["LlamaDecoderLayer"]),
}


def fit_on_this_rank(
    root: Path,
    strategy: str,
    settings: dict[str, Any],
    saved: str | None = None,
    ckpt_path: Path | None = None,
) -> tuple[Tensor, list[Any]]:
    """Fit with half of each batch; return the full weights and the counts."""
    settings = dict(settings)
    generates = settings.pop("generates", True)
    module, callback = UserModule(dropout=0.3 if saved else 0.0), method(**settings)
    if not generates:
        module.model.generate = None
    callbacks = [callback, *([saver(root / saved)] if saved else ())]
    run = trainer(root, callbacks, strategy=STRATEGIES[strategy](), devices=2)
    run.fit(module, datamodule=examples_stream(batch_size=2), ckpt_path=ckpt_path)
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), callback.counts


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
@PARAPHRASES
def test_two_ranks_end_where_one_process_ends(
    strategy: str, paraphrase: str | None, two_ranks: Ranks, tmp_path: Path
) -> None:
    """One prompt at a time, whose answers have unlike lengths on the two ranks; all answers reach both."""
    settings = {"paraphrase": paraphrase, "batch_size": 1, "cache_directory": tmp_path / "answers"}
    (first, counts), (second, others) = two_ranks.run(fit_on_this_rank, tmp_path, strategy, settings)
    assert torch.equal(first, second)
    assert counts == others
    torch.testing.assert_close(first, plain_loop(paraphrase is not None, 2), rtol=0, atol=1e-6)
    # and from the files of both
    settings["generates"] = False
    again = two_ranks.run(fit_on_this_rank, tmp_path, strategy, settings)
    assert torch.equal(again[0][0], first)
    # and from the files of one, which goes along while the other generates
    for path in (tmp_path / "answers").glob("*-rank1.jsonl"):
        path.unlink()
    settings["generates"] = True
    again = two_ranks.run(fit_on_this_rank, tmp_path, strategy, settings)
    assert torch.equal(again[0][0], first)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_resume_to_the_same_bits(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """In the second task, with dropout."""
    straight = two_ranks.run(fit_on_this_rank, tmp_path, strategy, {}, "straight")
    path = tmp_path / "straight" / "step=8.ckpt"
    assert path.is_dir() == (strategy == "fsdp2")
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, strategy, {"judge": Half(0)}, "resumed", path)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(resumed, straight, strict=True))
    assert resumed[0][1] == straight[0][1]


@pytest.mark.distributed
def test_sampled_answers_do_not_depend_on_the_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks draw what one process draws: in the first task the same counts."""
    settings = {"generation": {"do_sample": True}}
    alone = method(**settings)
    fit(tmp_path, alone)
    (_, counts), _ = two_ranks.run(fit_on_this_rank, tmp_path, "ddp", settings)
    assert counts[0] == alone.counts[0]
    greedy = method()
    fit(tmp_path, greedy)
    assert alone.counts != greedy.counts


def fit_with_fork(root: Path) -> None:
    """Fit by a launcher that must be refused; leave the error's text."""
    try:
        run = trainer(root, [method()], strategy="ddp_fork", devices=2)
        run.fit(UserModule(), datamodule=examples_stream())
    except Exception as error:
        (root / "error.txt").write_text(str(error))
        raise


def test_spawning_launchers_are_refused(tmp_path: Path) -> None:
    """They run the fit in children that keep what was learned to themselves."""
    assert exit_codes(functools.partial(fit_with_fork, tmp_path)) == [1]
    assert "ddp_spawn" in (tmp_path / "error.txt").read_text()


# ---------------------------------------------------------------------- with what else a run has


class Recorded(UserModule):
    """Keeps the batches of its steps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append({name: value.clone() for name, value in batch.items()})
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("first", [True, False])
def test_replayed_rows_stay_as_they_are_stored(first: bool, tmp_path: Path) -> None:
    """Before or behind a replay in the list: the incoming rows learn own answers, drawn ones what was stored."""
    own, replay = method(judge=lambda *texts: True), ExperienceReplay(8)
    module = Recorded()
    fit(tmp_path, *((own, replay) if first else (replay, own)), module=module)
    alone = Recorded()
    fit(tmp_path, method(judge=lambda *texts: True), module=alone)
    joint = module.seen[1]
    width = alone.seen[1]["labels"].shape[1]
    assert len(joint["labels"]) > 4
    assert torch.equal(joint["labels"][:4, :width], alone.seen[1]["labels"])
    golds = {tuple(row[row != -100].tolist()) for row in Examples(0).labels}
    assert all(tuple(row[row != -100].tolist()) in golds for row in joint["labels"][4:])


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"limit_train_batches": 2},
    ],
    ids=str,
)
def test_works_with_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    """And its samples are answered."""
    callback = method()
    assert torch.isfinite(fit(tmp_path, callback, **settings)).all()
    assert callback.counts[0][1] == ROWS
    assert callback.counts[0][2] > 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_samples_of_all_epochs_are_answered_and_no_others(epochs: int, tmp_path: Path) -> None:
    """A limit on batches shows other samples in each epoch, and none of them learns its gold answer unseen."""
    read: set[int] = set()

    class Ids(Callback):
        def on_train_batch_start(self, run: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if run.datamodule.task_of_epoch(run.current_epoch).index == 0:
                read.update(run.datamodule.batch_sample_ids(batch_idx)[0].tolist())

    callback = method(judge=lambda *texts: True)
    stream = examples_stream(epochs_per_task=epochs, batch_size=4)
    fit_stream(tmp_path, [callback, Ids()], module=UserModule(), stream=stream, limit_train_batches=1)
    assert callback.counts[0][1] == len(read)
    assert 4 * epochs >= len(read) > 4 * (epochs - 1)


class Manual(UserModule):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_is_the_same(tmp_path: Path) -> None:
    """Only the batch is another."""
    assert torch.equal(fit(tmp_path, method(), module=Manual()), fit(tmp_path, method()))


def test_causal_lm_with_adapters(tmp_path: Path) -> None:
    """Our own module is its own tokenizer, and a frozen base stays."""
    pytest.importorskip("peft")
    lora = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
    module = CausalLM({"model_type": "llama", "vocab_size": VOCABULARY, **SIZES}, adapter=lora, tokenizer="bytes")
    callback = method(tokenizer=None)
    fit(tmp_path, callback, module=module)
    assert all(own for _, _, own, _ in callback.counts)


def test_tokenizer_of_transformers(tmp_path: Path) -> None:
    """An object, as a module of a user's may have it; its end of text ends answers."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<eos>": 2, **{f"w{number}": number for number in range(VOCABULARY) if number != 2}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    seen: list[tuple[str, ...]] = []
    module = UserModule()
    module.tokenizer = tokenizer
    callback = method(judge=lambda *texts: seen.append(texts) or True, tokenizer=None)
    fit(tmp_path, callback, module=module)
    assert seen[0][0].split() == [f"w{token}" for token in Examples(0).input_ids[0, : len(seen[0][0].split())]]
    assert tokenizer.pad_token is None


class Generator(torch.nn.Module):
    """Writes the next number, and an end behind it."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        assert attention_mask[:, -1].all()
        return torch.cat([input_ids, input_ids[:, -1:] % 250 + 1, torch.full_like(input_ids[:, :1], 2)], dim=1)


def test_generate_of_ones_own(tmp_path: Path) -> None:
    """Named, it needs no model of transformers."""
    module = Recorded()
    module.writer = Generator()
    fit(tmp_path, method(judge=lambda *texts: True, generator="writer", stop=[2]), module=module)
    for batch in module.seen:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            (places,) = (labels != -100).nonzero(as_tuple=True)
            assert labels[places].tolist() == [int(ids[places[0] - 1]) % 250 + 1, 2]


def test_built_by_the_command_line(tmp_path: Path) -> None:
    """The class's signature is its YAML, with a judge by its name."""
    rows = [{"prompt": f"{n} + 1", "response": str(n + 1)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"{{class_path: InstructionSource, init_args: {{path: {tmp_path}/rows.jsonl, block_size: 24, "
    source += f"cache_dir: {tmp_path}/cache}}}}"
    (tmp_path / "run.yaml").write_text(
        f"""
{trainer_yaml(tmp_path)}
  callbacks:
    - class_path: SelfRehearsal
      init_args:
        judge: {{class_path: lightning_cl.callbacks.ExactMatch, init_args: {{numbers: true}}}}
        paraphrase: "Say it in your own words: {{response}}"
        max_new_tokens: 4
        generation: {{do_sample: true, temperature: 1.5}}
        cache_directory: {tmp_path}/answers
model:
  class_path: CausalLM
  init_args:
    model: {{model_type: llama, vocab_size: 259, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
             num_attention_heads: 2}}
    tokenizer: bytes
data:
  class_path: TaskStreamDataModule
  init_args:
    train: [{source}]
    val: [{source}]
    scenario: {{class_path: Predefined}}
    batch_size: 4
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    (file,) = (tmp_path / "answers").iterdir()
    assert {json.loads(line)["sample"] for line in file.read_text().splitlines()} == set(range(8))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "exact"}, "`judge` must be callable"),
        ({"paraphrase": "Reword."}, "`paraphrase` must say where the gold answer goes"),
        ({"stop": []}, "`stop` must hold at least one id"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be above 0, got 0"),
        ({"batch_size": 0}, "`batch_size` must be above 0, got 0"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """With the setting's name and what was given."""
    with pytest.raises(ValueError, match=message):
        method(**settings)


def fit_source(root: Path, source: Any, callback: SelfRehearsal | None = None) -> None:
    """Fit a single task."""
    stream = TaskStreamDataModule([source], [source], scenario=Predefined(), batch_size=2)
    trainer(root, [callback or method()]).fit(UserModule(), datamodule=stream)


def test_data_that_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    """Packed examples, texts without prompts, data without a stream, further columns of tokens, other batches."""
    rows = [{"prompt": f"{n} + 1", "response": str(n + 1)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    packed = InstructionSource(str(tmp_path / "rows.jsonl"), block_size=40, pack=True, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"5 stretches of supervised tokens.*packed"):
        fit_source(tmp_path, packed)
    with pytest.raises(ValueError, match="has no prompt"):
        fit_source(tmp_path, PackedTextSource(str(tmp_path / "a.txt"), block_size=8, cache_dir=tmp_path))
    loader = torch.utils.data.DataLoader(Examples(0), batch_size=4)
    with pytest.raises(ValueError, match="only a `TaskStreamDataModule` gives"):
        trainer(tmp_path, [method()], max_epochs=1).fit(UserModule(), loader, loader)

    class Positions(Examples):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), "position_ids": torch.arange(WIDTH)}

    with pytest.raises(ValueError, match="cannot know 'position_ids'"):
        fit_source(tmp_path, Positions(0), method(judge=lambda *texts: True))
    with pytest.raises(ValueError, match=r"mappings with `input_ids` and `labels`.*got list"):
        trainer(tmp_path, [method()]).fit(UserModule(), datamodule=toy_stream())

    class Classes(Examples):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), "labels": torch.tensor(1)}

    with pytest.raises(ValueError, match=r"`labels` must have the shape \(5, 12\)"):
        fit_source(tmp_path, Classes(0))


def test_modules_that_it_cannot_serve_are_refused(tmp_path: Path) -> None:
    """Without `generate`, without an end of answers, without a tokenizer for paraphrases."""
    with pytest.raises(ValueError, match="ToyModule cannot answer prompts"):
        trainer(tmp_path, [method()]).fit(ToyModule(), datamodule=toy_stream())
    with pytest.raises(ValueError, match=r"`generator='model.nothing'` names no submodule of UserModule"):
        fit(tmp_path, method(generator="model.nothing"))
    module = UserModule()
    module.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="has a token that ends an answer: give `stop`"):
        fit(tmp_path, method(tokenizer=None, stop=None), module=module)
    with pytest.raises(ValueError, match="`paraphrase` is a text and needs a `tokenizer`"):
        fit(tmp_path, method(tokenizer=None, paraphrase=REWORD))
    with pytest.raises(ValueError, match="`tokenizer='hash'` cannot be read back"):
        fit(tmp_path, method(tokenizer="hash"))


def test_footprint_is_at_most_every_answer(tmp_path: Path) -> None:
    """Four bytes a token, and sixteen for identity and length."""
    stream = examples_stream()
    run: Trainer = trainer(tmp_path, [callback := method()])
    run.fit(UserModule(), datamodule=stream)
    assert callback.footprint(run, run.lightning_module, None).host == ROWS * (4 * NEW + 16)


@pytest.mark.parametrize(
    ("settings", "gold", "own", "expected"),
    [
        ({}, "Yes.", " Yes.\n", True),
        ({}, "Yes.", "yes.", False),
        ({"ignore_case": True}, "Yes.", "yes.", True),
        ({"numbers": True}, "so 1,200 of 3 = 7", "It is 7.00!", True),
        ({"numbers": True}, "-7", "7", False),
        ({"numbers": True}, "5", "a range of 3-5", True),
        ({"numbers": True}, "-5", "x = \N{MINUS SIGN}5", True),
        ({"numbers": True}, "5", "3 - 8 = \N{MINUS SIGN}5", False),
        ({"numbers": True}, "5", "page\N{MINUS SIGN}5", True),
        ({"numbers": True}, "none", "none", False),
    ],
)
def test_exact_match(settings: dict[str, bool], gold: str, own: str, expected: bool) -> None:
    """White space, case and the last number."""
    assert ExactMatch(**settings)("?", gold, own) is expected
