r"""A retain term: predictions on retained data stay near those of the reference model.

The KL term of Maini et al. 2024, arXiv:2401.06121 (TOFU), section 4, and of Zhang et al. 2024, arXiv:2404.05868.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_cl.functional.distillation import distillation_loss
from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL, shifted

__all__ = ["RetainPositions", "kl_retain"]

RetainPositions = Literal["attended", "supervised", "all"]


def kl_retain(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    positions: RetainPositions = "attended",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Return the mean over positions of :math:`\mathrm{KL}(p^{ref} \,\|\, p)`.

    .. math:: \frac{1}{|P|} \sum_{(b,t) \in P} \sum_v p^{ref}_{btv} \left(\log p^{ref}_{btv} - \log p_{btv}\right)

    Its gradient for the scores of a position is :math:`(p - p^{ref}) / |P|`, 0 where both agree. Published code takes
    ``"all"``: padding then counts, so that the weight of the term depends on the longest row of a batch.

    Args:
        logits: Scores of the model, [B, T, V] or [B, C].
        ref_logits: Scores of the reference model, of the same shape; no gradient goes there.
        positions: P: ``"attended"``, where the attention mask is set; ``"supervised"``, those that predict a supervised
            token; ``"all"``.
        mask: Attention mask, bool or int [B, T], for ``"attended"``; all positions if ``None``. Not for [B, C].
        labels: For ``"supervised"``, as in :func:`~lightning_cl.functional.unlearning.shifted`.

    Returns:
        A scalar, float32; 0 with a graph if P is empty.

    Raises:
        ValueError: For unknown positions, ``"supervised"`` without labels, and shapes that do not fit.

    Example:
        >>> reference = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
        >>> mask = torch.tensor([[1, 0]])
        >>> kl_retain(torch.zeros(1, 2, 2), reference, mask=mask)
        tensor(0.3278)
        >>> kl_retain(torch.zeros(1, 2, 2), reference, positions="all")
        tensor(0.1639)
    """
    if positions not in ("attended", "supervised", "all"):
        raise ValueError(f"`positions` must be one of 'attended', 'supervised', 'all', got {positions!r}.")
    chosen: Tensor | None = None
    if positions == "supervised":
        if labels is None:
            raise ValueError("`positions='supervised'` needs `labels`. Give them, or choose 'attended' or 'all'.")
        logits, targets = shifted(logits, labels)
        ref_logits, _ = shifted(ref_logits, labels)
        chosen = targets != IGNORED_LABEL
    elif positions == "attended" and mask is not None:
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"A `mask` of shape {list(mask.shape)} does not fit logits of shape {list(logits.shape)}.")
        chosen = mask.to(torch.bool)
    return distillation_loss(logits, ref_logits.detach(), 1.0, positions=chosen)
