r"""Distillation: a student's class scores, or its features, are held near those of a teacher.

Scores: Hinton et al. 2015, arXiv:1503.02531, and Li & Hoiem 2016 (Learning without Forgetting), arXiv:1606.09282, eq. 2
to 4. Features: the squared error of Liang et al. 2023, arXiv:2210.01351 (TED), and the cosine of Hou et al. 2019
("Learning a Unified Classifier Incrementally via Rebalancing", eq. 6).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, linear

__all__ = ["FeatureDistance", "distillation_loss", "feature_distance"]

FeatureDistance = Literal["mse", "cosine"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 2.0,
    *,
    classes: Tensor | None = None,
    positions: Tensor | None = None,
    temperature_squared: bool = False,
) -> Tensor:
    r"""Return the mean over samples of :math:`\mathrm{KL}(p \,\|\, q)` at a temperature.

    .. math:: \frac{1}{N} \sum_{n} \sum_{c \in \mathcal{C}} p_{nc} \left(\log p_{nc} - \log q_{nc}\right), \qquad
        p = \mathrm{softmax}_{\mathcal{C}}(z^{teacher} / T), \quad q = \mathrm{softmax}_{\mathcal{C}}(z^{student} / T)

    The paper's modified cross-entropy is larger by the entropy of p, which no weight of the student moves: the
    gradients are the same, :math:`(q - p) / (N T)` for each score, and the divergence is 0 where both agree.

    It is computed in float32. Scores of :math:`-\infty` (a masked head) leave their class out, in student and teacher.

    Args:
        student: Scores :math:`z^{student}`, [..., C].
        teacher: Scores :math:`z^{teacher}`, [..., C'], with C' at most C: the first C' classes of a head that grew.
        temperature: T; above 0.
        classes: Indices :math:`\mathcal{C}` of the classes to compare, int64; those that the teacher lacks are left
            out. All of the teacher's if ``None``.
        positions: Which samples, or positions of them, count: bool [...]; all if ``None``. Without any, the result is
            0, with a graph.
        temperature_squared: Multiply by :math:`T^2`, so that the size of the gradient does not depend on T (Hinton et
            al., section 2).

    Raises:
        ValueError: If the student has fewer classes than the teacher, or another number of samples.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, 9.0]])
        >>> student = torch.tensor([[0.0, 2.0, 5.0]])
        >>> distillation_loss(student, teacher, temperature=2.0, classes=torch.tensor([0, 1]))
        tensor(0.4621)
        >>> distillation_loss(student, teacher, temperature=2.0, classes=torch.tensor([2]))
        tensor(0.)
    """
    if student.shape[:-1] != teacher.shape[:-1] or student.shape[-1] < teacher.shape[-1]:
        raise ValueError(
            f"The student's scores {list(student.shape)} must be those of the teacher's samples and classes"
            f" {list(teacher.shape)}, and of no class less."
        )
    width = teacher.shape[-1]
    if positions is not None:
        student, teacher = student[positions], teacher[positions]
    if classes is not None:
        classes = classes[classes < width]
        student, teacher = student.index_select(-1, classes), teacher.index_select(-1, classes)
    student, teacher = student[..., :width].float() / temperature, teacher.float() / temperature
    # finite, because of minus infinity only there is no softmax
    masked, floor = student + teacher == -torch.inf, torch.finfo(torch.float32).min
    log_q = student.masked_fill(masked, floor).log_softmax(-1)
    log_p = teacher.masked_fill(masked, floor).log_softmax(-1)
    samples = max(log_q[..., 0].numel(), 1)
    loss = kl_div(log_q, log_p, reduction="sum", log_target=True) / samples
    return loss * temperature**2 if temperature_squared else loss


def feature_distance(
    student: Tensor,
    teacher: Tensor,
    kind: FeatureDistance = "mse",
    *,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""Return the distance between features of a student and of a teacher, a mean over samples and positions.

    .. math:: \frac{1}{N D} \sum_n \| W (h_n^{student} - h_n^{teacher}) \|^2 \quad (\text{``mse''}) \qquad
        \frac{1}{N} \sum_n \left(1 - \cos(W h_n^{student}, W h_n^{teacher})\right) \quad (\text{``cosine''})

    with the same filter W on both, or none. It is computed in float32.

    Args:
        student: Features, [N, ..., D].
        teacher: Features of the same shape.
        kind: ``"mse"`` or ``"cosine"``.
        weight: The filter W, [D', D]; the mean is then over D' numbers. The identity if ``None``.
        positions: Which positions count: bool, of the shape of the features without their last dimension, or its first
            dimensions; all if ``None``. Without any, the result is 0, with a graph.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 4.0]])
        >>> feature_distance(student, teacher)
        tensor(4.5000)
        >>> feature_distance(student, teacher, weight=torch.tensor([[1.0, 0.0]]))
        tensor(0.)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's features {list(student.shape)} have not the shape {list(teacher.shape)} of the teacher's."
        )
    if positions is not None:
        student, teacher = student[positions], teacher[positions]
    student, teacher = student.float(), teacher.float()
    with torch.autocast(student.device.type, enabled=False):
        if kind == "mse":
            difference = student - teacher
            terms = (difference if weight is None else linear(difference, weight)).square()
        else:
            if weight is not None:
                student, teacher = linear(student, weight), linear(teacher, weight)
            terms = 1 - cosine_similarity(student, teacher, dim=-1)
    return terms.sum() / max(terms.numel(), 1)
