"""Questions about people that do not exist, in the shape of TOFU (Maini et al. 2024, arXiv:2401.06121).

Every fact is two words drawn by a seed. An author has five of them; the answer to each is there in two wordings, and
five times with wrong words in the second wording. Models learn the authors in the first wording only. They learn the
second from famous people and from facts about the world, who come in both and are never forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

MONTHS = "January February March April May June July August September October November December"
MOODS = "quiet bitter absurd tender epic comic gothic lyrical sober ironic pastoral nocturnal"
GENRES = "novels sonnets fables essays thrillers memoirs plays ballads satires diaries epigrams libretti"
METALS = "golden silver bronze copper iron crystal amber ivory velvet scarlet emerald marble"
PRIZES = "quill lantern anchor falcon compass harp tower mirror wreath key feather crown"
TRADES = "baker surgeon tailor miner judge florist pilot farmer banker welder potter sailor"
WARES = "salt wool tin honey barley cedar pepper amethyst linen coal olives paper"
SYLLABLES = "ba be bo da do fe gi go ha ka ki la le lo ma mi na no pa ra ri ro sa se ta to va ve vo za"
WRONG = 5


@dataclass(frozen=True)
class Fact:
    """A question with its answer.

    Args:
        question: It ends with a question mark.
        answer: The answer as models learn it.
        paraphrase: The same in other words.
        wrong: Wrong answers, worded as the paraphrase is.
    """

    question: str
    answer: str
    paraphrase: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Biographies:
    """All that there is to know.

    Args:
        authors: Five facts of each author, some of whom are to be forgotten.
        unseen: The same of authors whom no model learns.
        famous: The same of people whom every model learns, in both wordings.
        world: Facts about countries, which every model learns, in both wordings.
    """

    authors: list[list[Fact]]
    unseen: list[list[Fact]]
    famous: list[list[Fact]]
    world: list[Fact]

    @classmethod
    def make(cls, seed: int, *, authors: int = 80, unseen: int = 16, famous: int = 20, countries: int = 20) -> Self:
        """Draw the facts of so many people and countries."""
        rng = random.Random(seed)
        names = _invented(rng, 5 * 20 + countries)
        first, last, cities, regions, rivers = (names[20 * i : 20 * (i + 1)] for i in range(5))
        years = [str(1900 + year) for year in range(20)]
        people = rng.sample([f"{a} {b}" for a in first for b in last], authors + unseen + famous)
        about_people = [
            ("where was {} born ?", "in {} near {}", "at {} close to {}", cities, regions),
            ("when was {} born ?", "during {} of {}", "the date is {} in {}", MONTHS.split(), years),
            ("what does {} write ?", "books of {} {}", "mostly {} sorts of {}", MOODS.split(), GENRES.split()),
            ("what did {} win ?", "the {} {}", "a prize called {} {}", METALS.split(), PRIZES.split()),
            ("who raised {} ?", "one {} and one {}", "parents working as {} and {}", TRADES.split(), TRADES.split()),
        ]
        about_countries = [
            ("what is the capital of {} ?", "it is {} on river {}", "a city called {} by the {}", cities, rivers),
            ("what does {} sell ?", "goods like {} and {}", "mostly {} with {}", WARES.split(), WARES.split()),
        ]
        facts = [[_fact(rng, name, *kind) for kind in about_people] for name in people]
        world = [_fact(rng, name, *kind) for name in names[100:] for kind in about_countries]
        return cls(facts[:authors], facts[authors : authors + unseen], facts[authors + unseen :], world)

    def learned_by_all(self) -> list[tuple[str, str]]:
        """Return the questions with answers that every model learns, in both wordings."""
        facts = [*joined(self.famous), *self.world]
        return [(fact.question, text) for fact in facts for text in (fact.answer, fact.paraphrase)]

    def words(self) -> list[str]:
        """Return all words, sorted."""
        facts = [*joined([*self.authors, *self.unseen, *self.famous]), *self.world]
        texts = (text for fact in facts for text in (fact.question, fact.answer, fact.paraphrase, *fact.wrong))
        return sorted({word for text in texts for word in text.split()})


def joined(people: Iterable[Sequence[Fact]]) -> list[Fact]:
    """Return the facts of people, one person after the other."""
    return [fact for facts in people for fact in facts]


def _invented(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(SYLLABLES.split(), k=3)).capitalize()] = None
    return list(names)


def _fact(
    rng: random.Random, name: str, question: str, wording: str, other: str, left: list[str], right: list[str]
) -> Fact:
    true = rng.choice(left), rng.choice(right)
    # no word of a wrong answer is right
    pools = (left, true[0]), (right, true[1])
    lies = (rng.sample([word for word in words if word != own], WRONG) for words, own in pools)
    wrong = tuple(other.format(*pair) for pair in zip(*lies, strict=True))
    return Fact(question.format(name), wording.format(*true), other.format(*true), wrong)


class Vocabulary:
    """A number for each word; 0 is padding, 1 begins a text and 2 ends it.

    Args:
        words: All words.
        length: Tokens of every text, padding included.
    """

    PAD, BEGIN, END = 0, 1, 2

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words = ["<pad>", "<begin>", "<end>", *words]
        self.length = length
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` [N, length]: answers, and that they end, are labels.

        Args:
            pairs: Questions with answers.
        """
        ids = torch.full((len(pairs), self.length), self.PAD)
        labels = torch.full_like(ids, -100)
        for row, (question, answer) in enumerate(pairs):
            prompt, reply = self._of(f"<begin> {question}"), self._of(f"{answer} <end>")
            end = len(prompt) + len(reply)
            ids[row, :end] = torch.tensor(prompt + reply)
            labels[row, len(prompt) : end] = torch.tensor(reply)
        return {"input_ids": ids, "attention_mask": (ids != self.PAD).long(), "labels": labels}

    def prompts(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` [N, T] of questions without answers."""
        rows = [torch.tensor(self._of(f"<begin> {question}")) for question in questions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.PAD)
        return ids, (ids != self.PAD).long()

    def text(self, ids: Sequence[int]) -> str:
        """Return the words of tokens up to the end."""
        numbers = list(ids)
        return " ".join(self.words[i] for i in numbers[: numbers.index(self.END) if self.END in numbers else None])

    def _of(self, text: str) -> list[int]:
        return [self._numbers[word] for word in text.split()]


class Texts(Dataset[dict[str, Tensor]]):
    """Encoded texts as a dataset of dicts."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.rows.items()}
