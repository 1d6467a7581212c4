r"""Definitions of the continual-learning metrics, as pure functions of the accuracy matrix.

``R`` is a ``Tensor[T, N]``: ``R[t, i]`` is the score on task ``i`` after row ``t`` of the stream was learned. Higher is
better (negate a loss), the unit is that of the score, ``NaN`` means *not evaluated*. All functions share these rules:

- **Rows.** By default row ``t`` learns task ``t``. A stream that returns to tasks, or that learns several at once, says
  what each row trained: ``trained=[0, 1, 0]`` for a second visit of task 0, ``trained=[[0, 1, 2]]`` for the one row of
  a joint run, ``[]`` for a row that learned no task (a request to forget). A task is *seen* from the first row that
  trains it, and ``R[i, i]`` then means its score after that row.
- **Previous tasks** are the tasks seen, without those that the last row trained (``i < T - 1`` in a plain stream).
- **Unfinished streams.** Rows at the end that hold nothing but ``NaN`` have not been learned yet and are left out, so a
  matrix allocated for the whole stream gives the metrics *so far*.
- **Missing entries.** An entry that a definition needs and that is ``NaN`` raises a ``ValueError`` that names it; it is
  never skipped in a mean. Entries that are not needed may hold anything.
- **Undefined is NaN.** A mean over previous tasks is undefined while there are none (a stream of one task): forgetting,
  transfer and min-ACC are ``NaN`` then. They are not 0, which would read as "nothing was forgotten".

Every scalar comes back as a ``Tensor[]`` of the dtype of its input.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_cl.metrics._stream import Trained, check_evaluations, check_matrix, needed_entries, needed_per_task

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "min_accuracy",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]


def average_accuracy(R: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return the mean score over the tasks seen, after the last row.

    .. math:: \mathrm{ACC} = \frac{1}{T} \sum_{i=1}^{T} R_{T,i}

    Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 2.

    Args:
        R: Accuracy matrix ``[T, N]``.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Raises:
        ValueError: If a task seen was not evaluated after the last row.

    Example:
        >>> average_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(0.6500)
    """
    R, stream = check_matrix(R, trained)
    seen = list(stream.first)
    return needed_entries(R, [stream.last] * len(seen), seen, "average_accuracy").mean()


def average_incremental_accuracy(R: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return the mean over the rows of the average accuracy after each.

    .. math:: \bar{A} = \frac{1}{T} \sum_{t=1}^{T} \frac{1}{t} \sum_{i=1}^{t} R_{t,i}

    Rebuffi et al. 2017 (iCaRL), arXiv:1611.07725, section 4. Each row weighs the same.

    Args:
        R: Accuracy matrix ``[T, N]``.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Raises:
        ValueError: If a task was not evaluated after some row from the one that first trained it.

    Example:
        >>> average_incremental_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))  # the mean of 0.9 and 0.65
        tensor(0.7750)
    """
    R, stream = check_matrix(R, trained)
    means = []
    for row in range(stream.last + 1):
        seen = [task for task, first in stream.first.items() if first <= row]
        means.append(needed_entries(R, [row] * len(seen), seen, "average_incremental_accuracy").mean())
    return torch.stack(means).mean()


def forgetting(R: Tensor, reference: Literal["max", "initial"] = "max", *, trained: Trained | None = None) -> Tensor:
    r"""Return the mean over the previous tasks of the score lost since the reference; lower is better.

    .. math::
        f_i^T = \max_{t \in \{i, \dots, T-1\}} R_{t,i} - R_{T,i}, \qquad F_T = \frac{1}{T-1} \sum_{i=1}^{T-1} f_i^T

    Chaudhry et al. 2018 (RWalk), arXiv:1801.10112, section 3.2. The paper takes the maximum over *all* earlier rows;
    here it starts at the row that first trained the task, so that no score from before it was learned plays a part.
    With ``reference="initial"`` the maximum is replaced by :math:`R_{i,i}`, which gives ``-backward_transfer(R)``.

    Args:
        R: Accuracy matrix ``[T, N]``.
        reference: ``"max"`` for the best score between the task's first row and the last row but one, over the rows
            after which it was evaluated; ``"initial"`` for the score just after the task was first learned.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Returns:
        The scalar mean, ``NaN`` while there is no previous task.

    Raises:
        ValueError: If ``reference`` is unknown, or an entry that is needed is missing.

    Example:
        >>> R = torch.tensor([[0.6, 0.0, 0.0], [0.8, 0.9, 0.0], [0.5, 0.7, 0.9]])
        >>> forgetting(R)  # the mean of 0.8 - 0.5 and 0.9 - 0.7
        tensor(0.2500)
        >>> forgetting(R, reference="initial")  # the mean of 0.6 - 0.5 and 0.9 - 0.7
        tensor(0.1500)
    """
    # Needed entries have been checked, so NaN marks exactly the tasks that are not previous ones.
    return forgetting_per_task(R, reference, trained=trained).nanmean()


def forgetting_per_task(
    R: Tensor, reference: Literal["max", "initial"] = "max", *, trained: Trained | None = None
) -> Tensor:
    r"""Return what each task lost, :math:`f_i^T` of :func:`forgetting`; arguments and errors as there.

    Returns:
        ``Tensor[N]``; ``NaN`` for tasks that are not previous ones (trained by the last row, or not seen).

    Example:
        >>> forgetting_per_task(torch.tensor([[0.9, 0.0], [0.5, 0.8]]))
        tensor([0.4000,    nan])
    """
    if reference not in ("max", "initial"):
        raise ValueError(f'`reference` must be "max" or "initial", got {reference!r}.')
    R, stream = check_matrix(R, trained)
    lost = torch.full_like(R[0], torch.nan)
    for task in stream.previous:
        first = stream.first[task]
        earlier = R[first : stream.last, task]
        earlier = earlier[~earlier.isnan()]
        if reference == "initial" or earlier.numel() == 0:
            earlier = needed_entries(R, [first], [task], "forgetting")
        lost[task] = earlier.max() - needed_entries(R, [stream.last], [task], "forgetting")[0]
    return lost


def backward_transfer(R: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return how much later learning changed the previous tasks; negative values are forgetting.

    .. math:: \mathrm{BWT} = \frac{1}{T-1} \sum_{i=1}^{T-1} R_{T,i} - R_{i,i}

    Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 3.

    Args:
        R: Accuracy matrix ``[T, N]``.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Returns:
        The scalar mean, ``NaN`` while there is no previous task.

    Raises:
        ValueError: If a previous task was not evaluated after its first row or after the last row.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(-0.4000)
    """
    R, stream = check_matrix(R, trained)
    tasks = stream.previous
    final = needed_entries(R, [stream.last] * len(tasks), tasks, "backward_transfer")
    initial = needed_entries(R, [stream.first[task] for task in tasks], tasks, "backward_transfer")
    return (final - initial).mean()


def forward_transfer(R: Tensor, baseline: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return how much earlier learning helps tasks that are yet to be learned.

    .. math:: \mathrm{FWT} = \frac{1}{T-1} \sum_{i=2}^{T} R_{i-1,i} - \bar{b}_i

    Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 4. It needs the score on each task *before* it is learned, so the
    stream has to evaluate all tasks after each row, not only those seen.

    Args:
        R: Accuracy matrix ``[T, N]``.
        baseline: ``Tensor[N]``, the score of the randomly initialised model on each task.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Returns:
        The scalar mean over the tasks seen that the first row did not train, ``NaN`` while there are none.

    Raises:
        ValueError: If ``baseline`` has another length than ``R`` has tasks, or an entry that is needed is missing.

    Example:
        >>> R = torch.tensor([[0.9, 0.4], [0.5, 0.8]])
        >>> forward_transfer(R, baseline=torch.tensor([0.1, 0.1]))
        tensor(0.3000)
    """
    R, stream = check_matrix(R, trained)
    tasks = [task for task, first in stream.first.items() if first > 0]
    before = needed_entries(R, [stream.first[task] - 1 for task in tasks], tasks, "forward_transfer")
    return (before - needed_per_task(baseline, tasks, R, "baseline")).mean()


def learning_accuracy(R: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return the mean score of each task just after it was first learned (plasticity).

    .. math:: \mathrm{LA} = \frac{1}{T} \sum_{i=1}^{T} R_{i,i}

    Riemer et al. 2019 (MER), arXiv:1810.11910, section 5.

    Args:
        R: Accuracy matrix ``[T, N]``.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Raises:
        ValueError: If a task was not evaluated after the row that first trained it.

    Example:
        >>> learning_accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.8]]))
        tensor(0.8500)
    """
    R, stream = check_matrix(R, trained)
    return needed_entries(R, list(stream.first.values()), list(stream.first), "learning_accuracy").mean()


def intransigence(R: Tensor, joint: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return how far the stream stays behind a joint run when it learns a task; lower is better.

    .. math:: I = \frac{1}{T} \sum_{i=1}^{T} a_i^* - R_{i,i}

    Chaudhry et al. 2018 (RWalk), arXiv:1801.10112, section 3.2: there :math:`I_k = a_k^* - a_{k,k}` belongs to one task
    and :math:`a_k^*` comes from a joint model of the tasks up to ``k``. Here it is the mean over the tasks seen, and
    ``joint`` may be the last row of one joint run over all tasks.

    Args:
        R: Accuracy matrix ``[T, N]``.
        joint: ``Tensor[N]``, the score of a jointly trained model on each task.
        trained: What each row of ``R`` trained; row ``t`` trained task ``t`` when left out.

    Raises:
        ValueError: If ``joint`` has another length than ``R`` has tasks, or an entry that is needed is missing.

    Example:
        >>> intransigence(torch.tensor([[0.9, 0.1], [0.5, 0.8]]), joint=torch.tensor([0.95, 0.95]))
        tensor(0.1000)
    """
    R, stream = check_matrix(R, trained)
    tasks = list(stream.first)
    learned = needed_entries(R, list(stream.first.values()), tasks, "intransigence")
    return (needed_per_task(joint, tasks, R, "joint") - learned).mean()


def min_accuracy(scores: Tensor, task_of_evaluation: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return min-ACC: the mean over the previous tasks of the lowest score each fell to since it was learned.

    .. math:: \text{min-ACC}_{T_k} = \frac{1}{k-1} \sum_{i=1}^{k-1} \min_n A(E_i, f_n), \quad t_{|T_i|} < n \le t

    De Lange et al. 2023, arXiv:2205.13452, section 3. The minimum runs over the evaluations made while *later* rows
    were learned (not those at the end of the task itself); evaluations that left the task out are skipped.

    Args:
        scores: ``Tensor[E, N]`` of all evaluations during the stream, in order; ``NaN`` where not evaluated.
        task_of_evaluation: ``Tensor[E]`` of integers, the row of the stream that was being learned (or had just been)
            at each evaluation.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Returns:
        The scalar mean, ``NaN`` while there is no previous task.

    Raises:
        ValueError: If shapes or order are wrong, or a previous task was never evaluated after it was learned.

    Example:
        >>> scores = torch.tensor([[0.9, 0.0], [0.3, 0.5], [0.7, 0.8]])  # a dip to 0.3 that the end does not show
        >>> min_accuracy(scores, torch.tensor([0, 1, 1]))
        tensor(0.3000)
    """
    stream = check_evaluations(scores, task_of_evaluation, trained)
    lowest = scores.new_empty(len(stream.previous))
    for position, task in enumerate(stream.previous):
        later = scores[task_of_evaluation > stream.first[task], task]
        later = later[~later.isnan()]
        if later.numel() == 0:
            raise ValueError(f"min-ACC needs an evaluation of task {task} after it was learned; `scores` holds none.")
        lowest[position] = later.min()
    return lowest.mean()


def worst_case_accuracy(scores: Tensor, task_of_evaluation: Tensor, *, trained: Trained | None = None) -> Tensor:
    r"""Return WC-ACC: the score on the current task, traded off against the lowest scores of the previous ones.

    .. math:: \text{WC-ACC}_t = \frac{1}{k} A(E_k, f_t) + \left(1 - \frac{1}{k}\right) \text{min-ACC}_{T_k}

    De Lange et al. 2023, arXiv:2205.13452, section 3. It is a lower bound of the average accuracy. With one task it is
    that task's score. A row that trains several tasks counts each of them with :math:`1/k`, ``k`` being the tasks seen.

    Args:
        scores: ``Tensor[E, N]``, as for :func:`min_accuracy`.
        task_of_evaluation: ``Tensor[E]``, as for :func:`min_accuracy`.
        trained: What each row trained; row ``t`` trained task ``t`` when left out.

    Raises:
        ValueError: As for :func:`min_accuracy`, and if the last evaluation left out the current task.

    Example:
        >>> scores = torch.tensor([[0.9, 0.0], [0.3, 0.5], [0.7, 0.8]])
        >>> worst_case_accuracy(scores, torch.tensor([0, 1, 1]))  # 0.8 / 2 + 0.3 / 2
        tensor(0.5500)
    """
    stream = check_evaluations(scores, task_of_evaluation, trained)
    current = [task for task in stream.first if task not in stream.previous]
    final = needed_entries(scores, [len(scores) - 1] * len(current), current, "worst_case_accuracy", name="scores")
    if not stream.previous:
        return final.mean()
    lowest = min_accuracy(scores, task_of_evaluation, trained=trained)
    return (final.sum() + len(stream.previous) * lowest) / len(stream.first)


def windowed_forgetting(curve: Tensor, window: int) -> Tensor:
    r"""Return WF-w: the largest fall of a score within a window of ``w`` evaluations, mean over the tasks.

    .. math::
        \Delta^{w,-}_{t,E_i} = \max_{m \le n} \left( A(E_i, f_m) - A(E_i, f_n) \right), \; m, n \in [t - w + 1, t]

        WF^w_t = \frac{1}{N} \sum_{i=1}^{N} \max_{n \le t} \Delta^{w,-}_{n,E_i}

    De Lange et al. 2023, arXiv:2205.13452, section 3. The paper writes :math:`m < n`; with :math:`m \le n`, as in the
    authors' code, a score that never falls gives 0. The window counts the evaluations of the task: those that left it
    out are dropped from its curve first. A task that was never evaluated is left out of the mean.

    Args:
        curve: ``Tensor[E]`` of one task or ``Tensor[E, N]`` of all, in order; ``NaN`` where not evaluated.
        window: Number of evaluations :math:`w` in a window; at least 2.

    Returns:
        The scalar mean over the tasks, at least 0; ``NaN`` if no task was evaluated.

    Raises:
        ValueError: If ``window`` is below 2 or ``curve`` has another number of dimensions.

    Example:
        >>> curve = torch.tensor([0.9, 0.7, 0.4, 0.8])
        >>> windowed_forgetting(curve, window=2), windowed_forgetting(curve, window=3)
        (tensor(0.3000), tensor(0.5000))
    """
    return _largest_fall(curve, window)


def windowed_plasticity(curve: Tensor, window: int) -> Tensor:
    r"""Return WP-w: the largest rise of a score within a window of ``w`` evaluations, mean over the tasks.

    .. math:: \Delta^{w,+}_{t,E_i} = \max_{m \le n} \left( A(E_i, f_n) - A(E_i, f_m) \right), \; m, n \in [t - w + 1, t]

    De Lange et al. 2023, arXiv:2205.13452, section 3; the rest as in :func:`windowed_forgetting`.

    Args:
        curve: ``Tensor[E]`` of one task or ``Tensor[E, N]`` of all, in order; ``NaN`` where not evaluated.
        window: Number of evaluations :math:`w` in a window; at least 2.

    Returns:
        The scalar mean over the tasks, at least 0; ``NaN`` if no task was evaluated.

    Raises:
        ValueError: If ``window`` is below 2 or ``curve`` has another number of dimensions.

    Example:
        >>> windowed_plasticity(torch.tensor([0.1, 0.4, 0.9, 0.8]), window=2)
        tensor(0.5000)
    """
    return _largest_fall(-curve, window)


def _largest_fall(curve: Tensor, window: int) -> Tensor:
    if window < 2:
        raise ValueError(f"`window` must be at least 2 evaluations, got {window}.")
    if curve.ndim not in (1, 2):
        raise ValueError(f"`curve` must be Tensor[E] or Tensor[E, N], got shape {tuple(curve.shape)}.")
    falls = []
    for scores in curve.reshape(len(curve), -1).T:
        scores = scores[~scores.isnan()]
        if scores.numel() == 0:
            continue
        # A window of w evaluations holds exactly the pairs that lie at most w - 1 apart.
        pairs = [scores[:-gap] - scores[gap:] for gap in range(1, min(window, len(scores)))]
        falls.append(torch.cat([scores.new_zeros(1), *pairs]).max())
    return torch.stack(falls).mean() if falls else curve.new_tensor(torch.nan)
