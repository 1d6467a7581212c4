"""The monthly refresh job: a process of its own for each month, which starts from the last month's checkpoint.

python refresh.py --month 0; python refresh.py --month 1; ...
"""

from argparse import ArgumentParser
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from project import DigitClassifier, DigitsDataModule

from lightning_cl import EWC, ExperienceReplay

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def main(month: int, folder: Path, epochs: int = 10) -> list[float]:
    seed_everything(month)
    model = DigitClassifier()
    callbacks = [EWC(strength=100.0), ExperienceReplay(capacity=200)]
    # Lightning counts the epochs of all months, so the limit rises
    trainer = Trainer(accelerator="cpu", max_epochs=epochs * (month + 1), callbacks=callbacks, **QUIET)
    last = folder / f"month-{month - 1}.ckpt" if month else None
    trainer.fit(model, DigitsDataModule(month), ckpt_path=last)
    trainer.save_checkpoint(folder / f"month-{month}.ckpt")
    return [trainer.validate(model, DigitsDataModule(m), verbose=False)[0]["val_acc"] for m in range(month + 1)]


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--month", type=int, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/refresh"))
    options = parser.parse_args()
    print("accuracy on each month:", [round(score, 2) for score in main(options.month, options.folder)])
