"""An ordinary Lightning project: a module and a datamodule that know nothing of continual learning.

Every month the data team labels two more digits, and the classifier is trained on that month's images.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

MONTHS = 5


class DigitClassifier(LightningModule):
    def __init__(self, learning_rate: float = 3e-3):
        super().__init__()
        self.learning_rate = learning_rate
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self(images).argmax(-1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class DigitsDataModule(LightningDataModule):
    """The images of one month: the digits 0 and 1 in month 0, 2 and 3 in month 1, and so on."""

    def __init__(self, month: int, batch_size: int = 32):
        super().__init__()
        self.month = month
        self.batch_size = batch_size

    def setup(self, stage):
        self.train, self.val = (of_month(split, self.month) for split in (digits(train=True), digits(train=False)))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=256)


def digits(train: bool) -> TensorDataset:
    """Four of five images for training, the fifth for validation."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    rows = (torch.arange(len(labels)) % 5 != 0) == train
    return TensorDataset(images[rows], labels[rows])


def of_month(dataset: TensorDataset, month: int) -> Dataset:
    labels = dataset.tensors[1]
    return Subset(dataset, torch.nonzero(labels // 2 == month).flatten().tolist())
