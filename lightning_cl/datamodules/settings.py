"""The checks of a task stream's settings that need no data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules.scenarios import Scenario

__all__ = ["check_stream_settings"]


def check_stream_settings(
    scenario: Scenario,
    *,
    batch_size: int,
    epochs_per_task: int | list[int],
    steps_per_task: int | None,
    num_workers: int,
    seed: int,
    evaluate: str,
    evaluate_every_n_epochs: int | None,
    optimizer_policy: str,
    requests: Sequence[ForgetRequest] | None,
    epochs_per_request: int,
) -> None:
    """Refuse settings of :class:`~lightning_cl.datamodules.TaskStreamDataModule` out of range or at odds.

    Raises:
        ValueError: If so.
    """
    check_positive("batch_size", batch_size)
    check_positive("num_workers", num_workers, zero_allowed=True)
    check_positive("seed", seed, zero_allowed=True)
    for epochs in epochs_per_task if isinstance(epochs_per_task, list) else [epochs_per_task]:
        check_positive("epochs_per_task", epochs, zero_allowed=bool(requests))
    if steps_per_task is not None:
        check_positive("steps_per_task", steps_per_task)
        if epochs_per_task != 1:
            raise ValueError(
                f"`steps_per_task={steps_per_task}` takes the place of `epochs_per_task={epochs_per_task}`: give"
                " only one of them."
            )
    if evaluate_every_n_epochs is not None:
        check_positive("evaluate_every_n_epochs", evaluate_every_n_epochs)
    check_choice("evaluate", evaluate, ("seen", "all", "current"))
    check_choice("optimizer_policy", optimizer_policy, ("keep", "reset_state", "rebuild"))
    if not isinstance(scenario, Scenario):
        raise ValueError(f"`scenario` must be a scenario such as `ClassIncremental(n_tasks=5)`, got {scenario!r}.")
    if scenario.hides_boundaries and optimizer_policy != "keep":
        raise ValueError(
            f"`optimizer_policy={optimizer_policy!r}` acts at task boundaries, which {scenario!r} hides: leave it"
            " at 'keep'."
        )
    check_positive("epochs_per_request", epochs_per_request)
    for request in requests or ():
        if not isinstance(request, ForgetRequest):
            raise ValueError(f"`requests` must be a list of `ForgetRequest`, got {request!r}.")
