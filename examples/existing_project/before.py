"""Train on one month after the other: by the end the model knows the last month only."""

from lightning.pytorch import Trainer, seed_everything
from project import MONTHS, DigitClassifier, DigitsDataModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def main(epochs: int = 10) -> list[float]:
    seed_everything(0)
    model = DigitClassifier()
    for month in range(MONTHS):
        trainer = Trainer(accelerator="cpu", max_epochs=epochs, **QUIET)
        trainer.fit(model, DigitsDataModule(month))
    return [trainer.validate(model, DigitsDataModule(month), verbose=False)[0]["val_acc"] for month in range(MONTHS)]


if __name__ == "__main__":
    print("accuracy on each month:", [round(score, 2) for score in main()])
