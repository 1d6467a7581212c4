"""Modules as users bring them, each with its data as a list of samples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

Samples = list[Any]


class UserModule(LightningModule):
    """What they share: weights from a seed, plain SGD, a validation step."""

    learning_rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.build()

    def build(self) -> None:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_zero", 0.0, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    @staticmethod
    def samples(count: int) -> Samples:
        """Return ``count`` samples as a dataset gives them."""
        raise NotImplementedError


def _draw(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


class Images(UserModule):
    """Convolution, batch normalisation and dropout; calls its children and has no `forward` of use."""

    def build(self) -> None:
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.head = nn.Linear(12, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    @staticmethod
    def samples(count: int) -> Samples:
        return [(image, number % 3) for number, image in enumerate(_draw(count, 1, 4, 4))]


class Texts(UserModule):
    """Token ids in a mapping, padded by 0, one label for each text."""

    def build(self) -> None:
        self.embedding = nn.Embedding(11, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        present = (input_ids != 0).unsqueeze(-1)
        mean = (self.embedding(input_ids) * present).sum(1) / present.sum(1)
        return self.head(self.norm(mean))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        labels = batch.pop("labels")
        return {"loss": cross_entropy(self(**batch), labels)}

    @staticmethod
    def samples(count: int) -> Samples:
        texts = []
        for number in range(count):
            ids = torch.randint(1, 11, (5,), generator=torch.Generator().manual_seed(number))
            ids[2 + number % 4 :] = 0
            texts.append({"input_ids": ids, "labels": torch.tensor(number % 3)})
        return texts


class Tokens(UserModule):
    """A label for each token; positions of padding have the label -100, some texts have no other."""

    def build(self) -> None:
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(input_ids)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    @staticmethod
    def samples(count: int) -> Samples:
        samples = Texts.samples(count)
        for number, sample in enumerate(samples):
            ids = sample["input_ids"]
            sample["labels"] = torch.where((ids == 0) | (number % 7 == 3), -100, ids % 5)
        return samples


class Tied(UserModule):
    """The embedding's weight is the head's as well, so a sample's gradient has two parts."""

    def build(self) -> None:
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(input_ids).mean(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["input_ids"]), batch["labels"])

    @staticmethod
    def samples(count: int) -> Samples:
        return Texts.samples(count)


class Attention(UserModule):
    """`nn.MultiheadAttention` uses its projections by functions, so no layer is called for them."""

    def build(self) -> None:
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0].mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    @staticmethod
    def samples(count: int) -> Samples:
        return [(steps, number % 3) for number, steps in enumerate(_draw(count, 3, 4))]


class Weighted(UserModule):
    """Class weights: the loss of a batch is no mean of the losses of its samples."""

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.register_buffer("class_weights", torch.tensor([0.2, 1.0, 5.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], weight=self.class_weights)

    @staticmethod
    def samples(count: int) -> Samples:
        # the first three are of one class
        return [(inputs, max(number - 2, 0) % 3) for number, inputs in enumerate(_draw(count, 4))]


class Regression(UserModule):
    """No classes at all."""

    def build(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]).squeeze(-1), batch[1])

    @staticmethod
    def samples(count: int) -> Samples:
        return [(inputs, inputs.sum()) for inputs in _draw(count, 4)]


class Manual(UserModule):
    """Steps two optimizers itself; a parameter is in none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs) * self.scale))

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=self.learning_rate) for part in (self.body, self.head)]

    @staticmethod
    def samples(count: int) -> Samples:
        return [(inputs, number % 3) for number, inputs in enumerate(_draw(count, 4))]


def loader(kind: type[UserModule], count: int = 11, batch_size: int = 4) -> DataLoader[Any]:
    """The data of a module in batches; by default two of four and one of three."""
    return DataLoader(kind.samples(count), batch_size=batch_size)
