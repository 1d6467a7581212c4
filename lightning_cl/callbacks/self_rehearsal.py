"""Selective self-rehearsal (Gupta et al. 2024, arXiv:2409.04787) and S3FT (2025, arXiv:2502.08130)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.answering import Answering, TextTokenizer, find_generator, text_tokenizer
from lightning_cl.callbacks.answers import Answer, AnswerFile, Answers, Generated, purge_files
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.capture import move_batch, undisturbed
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.distributed import rank, sum_over_ranks_, world_size
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import IdentifiedData
from lightning_cl.functional.self_rehearsal import find_answers, replace_answers

__all__ = ["SelfRehearsal"]

_COLUMNS = ("input_ids", "attention_mask", "labels")


class SelfRehearsal(ContinualCallback):
    r"""Train on the model's own answers where they are right, and on the gold ones where they are not.

    Before a task :math:`D = \{(x, y)\}` is trained, the model :math:`\theta` as it stands answers every prompt,
    :math:`\hat y \sim p_\theta(\cdot \mid x)`, and the step's target for the sample is

    .. math:: y' = \begin{cases} \hat y & \text{if the judge accepts } \hat y \text{ for } (x, y) \\
        \tilde y & \text{else, if } \tilde y \text{, the model's paraphrase of } y \text{, is accepted} \\
        y & \text{else} \end{cases}

    so that the model is moved no farther than its mistakes ask for. SSR is without the second line, S3FT with it
    (``paraphrase``). Everything else stays the user's: loss, optimizer, adapters.

    Batches are mappings with ``input_ids``, ``labels`` (-100 on prompts and padding, not shifted) and, with padding,
    ``attention_mask``; a row holds one prompt and one answer behind it, such as those of
    :class:`~lightning_cl.datamodules.InstructionSource`. Each sample is answered once, over all ranks, and keeps its
    answer for the whole task. Answers without an end are not taken.

    Args:
        judge: Called with the texts of prompt, gold answer and own answer; says whether the own one is right. Such as
            :class:`~lightning_cl.callbacks.ExactMatch`. It runs on the rank that made the answer.
        paraphrase: Prompt by which the model rewords a gold answer, with ``{response}`` and, if wanted, ``{prompt}`` in
            their places; ``None`` leaves paraphrases out.
        tokenizer: Makes texts of ids: ``"bytes"``, the name or path of a tokenizer of transformers, or such an object;
            the module's attribute ``tokenizer`` if ``None``. Without any, texts are ids with blanks between.
        max_new_tokens: Longest answer.
        generation: Further arguments of ``generate``, such as ``{"do_sample": True, "temperature": 0.7}``; greedy if
            ``None``.
        generator: Name of the submodule that generates; by default the first with the ``generate`` of transformers.
        stop: Ids that end an answer; those of the tokenizer and of the model's generation config if ``None``.
        batch_size: Prompts answered at once on each rank.
        cache_directory: Folder of files in JSON lines, in which answers stand as soon as they are made, so that a run
            that is killed while it generates goes on where it stopped. Files belong to the weights and to the settings
            of generation; the judge is asked again. They stay until they are deleted; see :meth:`purge`.
        seed: Seed of sampled answers.

    Attributes:
        counts: For each task so far its index, and how many samples it has, with own answers and with paraphrases.

    Raises:
        ValueError: For a setting out of range; at the start of a fit without a task stream, with a module that cannot
            generate, or without a token that ends an answer; before a task with rows of several answers.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="self-rehearsal",
        family="replay",
        paper="Gupta et al. 2024, arXiv:2409.04787; 2025, arXiv:2502.08130",
        needs="a language model that generates, prompts with answers, a judge; a task stream",
        state="the tokens of the answers that were taken, of the present task; with `cache_directory` files of all",
        stores_inputs=True,
    )

    def __init__(
        self,
        judge: Callable[[str, str, str], bool],
        *,
        paraphrase: str | None = None,
        tokenizer: Any = None,
        max_new_tokens: int = 256,
        generation: dict[str, Any] | None = None,
        generator: str | None = None,
        stop: list[int] | None = None,
        batch_size: int = 16,
        cache_directory: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not callable(judge):
            raise ValueError(f"`judge` must be callable with prompt, gold and own answer, got {judge!r}.")
        if paraphrase is not None and "{response}" not in paraphrase:
            raise ValueError(f"`paraphrase` must say where the gold answer goes by '{{response}}', got {paraphrase!r}.")
        if stop is not None and not stop:
            raise ValueError("`stop` must hold at least one id, got [].")
        check_positive("max_new_tokens", max_new_tokens)
        check_positive("batch_size", batch_size)
        self.judge = judge
        self.paraphrase = paraphrase
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.generation = {"do_sample": False} if generation is None else dict(generation)
        self.generator = generator
        self.stop = stop
        self.batch_size = batch_size
        self.cache_directory = None if cache_directory is None else Path(cache_directory)
        self.seed = seed
        self.counts: list[tuple[int, int, int, int]] = []
        self._answers = Answers.none()
        self._texts: TextTokenizer | None = None
        self._answering: Answering | None = None
        self._pad_id = 0

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not isinstance(trainer.datamodule, IdentifiedData):  # type: ignore[attr-defined]
            raise ValueError(
                "`SelfRehearsal` finds the answers to a sample by its identity, which only a `TaskStreamDataModule`"
                " gives: pass your datasets to one."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        generator = find_generator(pl_module, self.generator)
        self._texts = text_tokenizer(self.tokenizer, pl_module)
        if self.paraphrase is not None and self._texts is None:
            raise ValueError("`paraphrase` is a text and needs a `tokenizer`: give 'bytes', a name, or an object.")
        stop = self._stop(generator)
        config = getattr(generator, "generation_config", None)
        pads = (getattr(self._texts, "pad_id", None), getattr(config, "pad_token_id", None), stop[0])
        self._pad_id = next(int(value) for value in pads if value is not None)
        settings = {"max_new_tokens": self.max_new_tokens, **self.generation}
        self._answering = Answering(trainer, pl_module, generator, stop, self._pad_id, settings)

    def _stop(self, generator: Any) -> list[int]:
        if self.stop is not None:
            return self.stop
        of_model = getattr(getattr(generator, "generation_config", None), "eos_token_id", None)
        of_text = getattr(self._texts, "eos_id", None)
        ids = [*(of_model if isinstance(of_model, (list, tuple)) else [of_model]), of_text]
        found = sorted({int(value) for value in ids if value is not None})
        if not found:
            raise ValueError(
                "Neither the tokenizer nor the model's generation config has a token that ends an answer: give `stop`."
            )
        return found

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # it holds the Trainer, and the callback may be pickled
        self._answering = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._answering = None

    # ------------------------------------------------------------------ before a task

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        # in an order and in groups that do not depend on the number of ranks
        samples = _samples(trainer, task)
        groups = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        file = self._file(task)
        found: dict[int, Answer] = {}
        with undisturbed(pl_module, self.seed):
            for first in range(0, len(groups), world_size()):
                number = first + rank()
                rows: list[tuple[int, Tensor, Tensor]] = []
                if number < len(groups):
                    rows = self._rows(trainer, pl_module, torch.from_numpy(groups[number]))
                decided = self._answer(rows, task, number, file)
                found.update({row[0]: answer for row, answer in zip(rows, decided, strict=True)})
        self._answers = Answers.of_all_ranks(found, pl_module.device)
        self._count(trainer, pl_module, task, len(samples), found)

    def _rows(self, trainer: Trainer, pl_module: LightningModule, samples: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Return identity, prompt and gold answer of samples that have one."""
        batch = move_batch(trainer, pl_module, trainer.datamodule.fetch(samples))  # type: ignore[attr-defined]
        found = find_answers(*_columns(batch))
        pairs = zip(samples.tolist(), found, strict=True)
        return [(sample, prompt.cpu(), gold.cpu()) for sample, (prompt, gold) in pairs if len(gold)]

    def _answer(
        self, rows: list[tuple[int, Tensor, Tensor]], task: Task, group: int, file: AnswerFile | None
    ) -> list[Answer]:
        """Return what each row learns; all ranks call it, also those that have nothing to generate."""
        assert self._answering is not None
        known = [file.known(*row) for row in rows] if file else [None] * len(rows)
        prompts = [] if all(known) else [row[1] for row in rows]
        own = self._answering.generate(prompts, derived_seed(self.seed, "own", task.index, group))
        made = [made for made in known if made] if not prompts else [Generated(ids) for ids in own]
        if prompts:
            self._keep(file, rows, made)
        decided = [self._judged(row, answers.own, "own") for row, answers in zip(rows, made, strict=True)]
        if self.paraphrase is not None:
            wrong = [place for place, answer in enumerate(decided) if answer.kind == "gold"]
            # another judge may have left some of them out
            missing = any(made[place].paraphrase is None for place in wrong)
            prompts = [self._paraphrase_prompt(rows[place]) for place in wrong] if missing else []
            again = self._answering.generate(prompts, derived_seed(self.seed, "paraphrase", task.index, group))
            if prompts:
                for place, ids in zip(wrong, again, strict=True):
                    made[place] = replace(made[place], paraphrase=ids)
                self._keep(file, [rows[place] for place in wrong], [made[place] for place in wrong])
            for place in wrong:
                decided[place] = self._judged(rows[place], made[place].paraphrase or (), "paraphrase")
        return decided

    def _keep(self, file: AnswerFile | None, rows: list[tuple[int, Tensor, Tensor]], made: list[Generated]) -> None:
        if file:
            texts = [self._text(torch.tensor(answers.own, dtype=torch.int64)) for answers in made]
            file.write([(*row, *one) for row, one in zip(rows, zip(made, texts, strict=True), strict=True)])

    def _judged(
        self, row: tuple[int, Tensor, Tensor], ids: tuple[int, ...], kind: Literal["own", "paraphrase"]
    ) -> Answer:
        # the end alone is no answer
        if len(ids) < 2 or not self.judge(*(self._text(part) for part in (*row[1:], torch.tensor(ids)))):
            return Answer("gold")
        return Answer(kind, ids)

    def _text(self, ids: Tensor) -> str:
        assert self._answering is not None
        ids = self._answering.text_ids(ids)
        return " ".join(map(str, ids.tolist())) if self._texts is None else self._texts.decode(ids)

    def _paraphrase_prompt(self, row: tuple[int, Tensor, Tensor]) -> Tensor:
        assert self.paraphrase is not None and self._texts is not None
        values = {"{prompt}": self._text(row[1]), "{response}": self._text(row[2])}
        text = re.sub(r"\{prompt\}|\{response\}", lambda found: values[found[0]], self.paraphrase)
        ids, _ = self._texts.encode_parts([text], np.asarray([True]), np.asarray([False]))
        return torch.from_numpy(ids.astype(np.int64))

    def _file(self, task: Task) -> AnswerFile | None:
        if self.cache_directory is None:
            return None
        assert self._answering is not None
        # generated tokens do not depend on the judge, which has no name that would tell it from others
        identity = None if self._texts is None else self._texts.identity
        settings = (self.paraphrase, identity, self.batch_size, self.seed)
        name = f"task-{task.index}-{self._answering.fingerprint()}-{derived_seed(repr(settings)):016x}"
        return AnswerFile(self.cache_directory, name)

    def _count(
        self, trainer: Trainer, pl_module: LightningModule, task: Task, samples: int, found: Mapping[int, Answer]
    ) -> None:
        kinds = [answer.kind for answer in found.values()]
        mine = torch.tensor([kinds.count("own"), kinds.count("paraphrase")], device=pl_module.device)
        own, paraphrased = sum_over_ranks_(mine).tolist()
        self.counts = [*self.counts, (task.index, samples, own, paraphrased)]
        rank_zero_info(
            f"Task '{task.name}': of {samples} samples {own} learn the model's own answer and {paraphrased} its"
            " paraphrase, the others the gold one."
        )
        shares = {"self_rehearsal/own": own / samples, "self_rehearsal/paraphrase": paraphrased / samples}
        for logger in trainer.loggers:
            logger.log_metrics(shares, step=trainer.global_step)

    # ------------------------------------------------------------------ the step

    @override
    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        if not len(self._answers):
            return batch
        sample_ids, owners = trainer.datamodule.batch_sample_ids(batch_idx)  # type: ignore[attr-defined]
        answers = self._answers.of(sample_ids[owners == trainer.global_rank] if world_size() > 1 else sample_ids)
        ids, labels, mask = _columns(batch)
        # rows behind the incoming ones are replayed samples of other tasks
        answers += [None] * (len(ids) - len(answers))
        if all(answer is None for answer in answers):
            return batch
        _check_width(batch, ids)
        new = replace_answers(ids, labels, mask, answers, pad_id=self._pad_id)
        changed = copy(batch)
        changed.update(
            {
                name: value
                for name, value in zip(("input_ids", "labels", "attention_mask"), new, strict=True)
                if value is not None
            }
        )
        return changed

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        tasks: Sequence[Task] = getattr(trainer.datamodule, "tasks", ())  # type: ignore[attr-defined]
        samples = max((task.length or 0 for task in tasks), default=0)
        # every answer as long as it may be, in int32, with its identity and length
        return Footprint(host=samples * (4 * self.max_new_tokens + 16))

    def purge(self, sample_ids: Tensor) -> int:
        """Remove the answers to samples, here, in every later checkpoint and in all files of ``cache_directory``.

        Every rank must purge the same ids. From then on the samples learn their gold answers; a later task that reads
        them answers them anew, so take them out of the data too.

        Args:
            sample_ids: Identities, also of samples without an answer, int64 [n].

        Returns:
            How many answers of the present task were removed.
        """
        ids = set(sample_ids.tolist())
        before = len(self._answers)
        self._answers = self._answers.without(ids)
        if self.cache_directory is not None:
            purge_files(self.cache_directory, ids)
        return before - len(self._answers)

    @override
    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        return [Influence(type(self).__name__, "answers to the samples", "removed", self.purge(sample_ids))]

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # generated with earlier weights; a task that comes generates its own
        name, state = type(self).__name__, "answers to other samples"
        found = [Influence(name, state, "removed", len(self._answers))]
        self._answers = Answers.none()
        if self.cache_directory is not None:
            found.append(Influence(name, f"{state}, in `cache_directory`", "remains"))
        return found

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"answers": self._answers.state_dict(), "counts": [list(counts) for counts in self.counts]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._answers = Answers(**state_dict["answers"])
        self.counts = [(task, samples, own, again) for task, samples, own, again in state_dict["counts"]]


def _samples(trainer: Trainer, task: Task) -> np.ndarray:
    """Return the identities of the samples that any epoch of a task reads, ascending."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    # the loader's own one stays where it is
    sampler: Any = copy(trainer.train_dataloader.sampler)  # type: ignore[union-attr]
    steps = int(trainer.num_training_batches)
    epochs = (
        1 if steps * sampler.global_batch_size >= len(sampler.rows) else datamodule.epochs_and_batches()[task.index][0]
    )
    found = np.empty(0, dtype=np.int64)
    for epoch in range(epochs):
        sampler.set_position(epoch=epoch)
        read = torch.cat([datamodule.samples.batch_ids(sampler, step)[0] for step in range(steps)])
        found = np.union1d(found, read.numpy())
    return found


def _columns(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ids, labels and mask of a batch."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        what = f"the keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"`SelfRehearsal` needs batches that are mappings with `input_ids` and `labels` (-100 on prompts), got"
            f" {what}. `InstructionSource` gives them."
        )
    if batch["labels"].shape != batch["input_ids"].shape:
        raise ValueError(
            f"`labels` must have the shape {tuple(batch['input_ids'].shape)} of `input_ids`, a label for each token,"
            f" got {tuple(batch['labels'].shape)}."
        )
    return batch["input_ids"], batch["labels"], batch.get("attention_mask")


def _check_width(batch: Mapping[str, Any], ids: Tensor) -> None:
    """Refuse further columns with an entry for each token, which would not fit the new answers."""
    for name, value in batch.items():
        if name not in _COLUMNS and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            raise ValueError(
                f"`SelfRehearsal` puts other tokens into a batch and cannot know {name!r} for them. Leave it out of the"
                " batches, or make it in `training_step`."
            )
