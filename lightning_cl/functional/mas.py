r"""Memory aware synapses (Aljundi et al. 2018, arXiv:1711.09601): how much each weight sways a model's output.

With :math:`f` the model and :math:`N` samples, section 4 of the paper measures

.. math:: \Omega = \frac{1}{N} \sum_n \left| \frac{\partial \lVert f(x_n) \rVert_2^2}{\partial \theta} \right| .

The absolute value is that of one sample, never of a batch, so the result does not depend on the batch size, and no
label is needed. Here are the sums, to be divided once by the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_cl.functional.sample_loop import AbsoluteGradients

__all__ = ["SensitivitySums", "output_sensitivity"]


@dataclass(frozen=True)
class SensitivitySums:
    """Sums over the samples of a batch.

    Args:
        sums: Absolute gradients summed over samples, by parameter name.
        count: Number of samples summed over; those without any position that counts do not count.
    """

    sums: dict[str, Tensor]
    count: int


def output_sensitivity(
    tape: AbsoluteGradients,
    outputs: Tensor,
    *,
    positions: Tensor | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> SensitivitySums:
    r"""Sum :math:`|\nabla_\theta \lVert f(x_n) \rVert_2^2|` over samples, from one backward pass.

    Args:
        tape: What recorded the forward pass.
        outputs: :math:`f(x)`, ``[B, ...]``; the norm is taken over all that belongs to a sample, without what a mask
            made infinite.
        positions: Which positions count, such as those that are no padding: bool ``[B, T]`` for outputs ``[B, T, C]``,
            or in general of the outputs' shape without its last dimension. All of them if ``None``.
        into: Accumulators by name, which are added to and returned.

    Raises:
        ValueError: If ``positions`` does not fit ``outputs``.

    Example:
        >>> import torch
        >>> from lightning_cl.functional import LayerTape
        >>> layer = torch.nn.Linear(1, 1)
        >>> layer.load_state_dict({"weight": torch.tensor([[1.0]]), "bias": torch.tensor([0.0])})
        <All keys matched successfully>
        >>> with LayerTape(layer, ["bias"]) as tape:
        ...     outputs = layer(torch.tensor([[1.0], [-1.0]]))  # gradients 2 and -2, of sum 0
        ...     output_sensitivity(tape, outputs)
        SensitivitySums(sums={'bias': tensor([4.])}, count=2)
    """
    # the gradient of the squared norm with respect to the outputs
    cotangent = 2 * outputs.detach()
    cotangent.masked_fill_(cotangent.isinf(), 0.0)
    count = len(outputs)
    if positions is not None:
        if positions.shape != outputs.shape[:-1]:
            raise ValueError(
                f"`positions` of shape {tuple(positions.shape)} do not fit outputs of shape {tuple(outputs.shape)}: one"
                " entry for each position is needed."
            )
        cotangent.masked_fill_(~positions.unsqueeze(-1), 0.0)
        count = int(positions.reshape(count, -1).any(1).sum())
    return SensitivitySums(tape.absolute_sums(outputs, [cotangent], batch_size=len(outputs), into=into), count)
