"""Train on all months in one fit: a task stream takes the place of the datamodule and of the loop."""

from lightning.pytorch import Trainer, seed_everything
from project import MONTHS, DigitClassifier, digits

from lightning_cl import EWC, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def main(epochs: int = 10) -> list[float]:
    seed_everything(0)
    model = DigitClassifier()
    stream = TaskStreamDataModule(
        digits(train=True),
        digits(train=False),
        scenario=ClassIncremental(n_tasks=MONTHS),
        batch_size=32,
        epochs_per_task=epochs,
        optimizer_policy="rebuild",
    )
    metrics = ContinualMetrics(monitor="val_acc", directory="runs/after_stream")
    callbacks = [EWC(strength=100.0), ExperienceReplay(capacity=200), metrics]
    trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=callbacks, **QUIET)
    trainer.fit(model, datamodule=stream)
    print({name: round(value, 2) for name, value in metrics.compute().items()})
    return metrics.matrix[-1].tolist()


if __name__ == "__main__":
    print("accuracy on each month:", [round(score, 2) for score in main()])
