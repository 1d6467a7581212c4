"""The cost of an optimizer's step, as ratios within one run: ``python benchmarks/optimizers.py [--quick] [--gpu]``.

Weights lie in 100 tensors: 10 million on one thread of a CPU, 1 billion on a GPU. Each ratio compares two optimizers
that take turns (A B A B ...) on gradients without spikes, past the clip delay and between resets; the median over the
turns is shown. On the CPU the bar is held against the processor time, on a GPU against the clock.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import LightningModule
from measuring import Ratio, be_quiet, ratio, show, take_turns, write
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from workloads import Cost, quiet_trainer

from lightning_cl import SpikeAware
from lightning_cl.core.update import OptimizerStep
from lightning_cl.optim import SPAM, StableSPAM

RESULTS = Path(__file__).parent / "results"
TENSORS, WARM_STEPS = 100, 25

Make = Callable[[list[Parameter]], Optimizer]


class Bench:
    """Gradients that all optimizers share, and runs of their steps."""

    def __init__(self, weights: int, device: str, steps: int, turns: int) -> None:
        self.workload, self.device, self.steps, self.turns = f"{weights // 10**6}M, {device}", device, steps, turns
        shape = (weights // TENSORS // 512, 512)
        generator = torch.Generator(device).manual_seed(0)
        self.gradients = [torch.randn(shape, generator=generator, device=device) for _ in range(TENSORS)]

    def ratio(self, what: str, base: Callable[[], None], run: Callable[[], None], bar: float | None = None) -> Ratio:
        """Compare two kinds of steps."""
        for _ in range(WARM_STEPS):
            base()
            run()
        turns = take_turns(self.turns, lambda: self._time(base), lambda: self._time(run))
        return ratio(self.workload, what, turns, bar)

    def _time(self, step: Callable[[], None]) -> Cost:
        self._wait()
        start = Cost.now()
        for _ in range(self.steps):
            step()
        self._wait()
        cost = Cost.now() - start
        # the processor only waits for a GPU
        return cost if self.device == "cpu" else Cost(cost.wall, cost.wall)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def optimizer(self, make: Make) -> Optimizer:
        """Make one over weights of its own."""
        parameters = [Parameter(torch.zeros_like(gradient)) for gradient in self.gradients]
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return make(parameters)


def adamw(**settings: Any) -> Make:
    return lambda parameters: AdamW(parameters, **settings)


def spam(**settings: Any) -> Make:
    return lambda parameters: SPAM(parameters, **settings)


def stable_spam(**settings: Any) -> Make:
    return lambda parameters: StableSPAM(parameters, **settings)


def spike_aware(optimizer: Optimizer) -> Callable[[], None]:
    """The steps of an optimizer with the callback's hooks around it."""
    callback, trainer, module = SpikeAware(), quiet_trainer(), LightningModule()
    named = {f"{number}": p for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    step = OptimizerStep(optimizer, named)

    def take() -> None:
        callback.limit_gradients(trainer, module, step)
        optimizer.step()
        callback.change_update(trainer, module, step)

    return take


def bytes_of_state(optimizer: Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(value.untyped_storage().nbytes() for value in values)


def measure(bench: Bench, only: str) -> list[Ratio]:
    """All ratios of one device."""
    single, together = adamw(foreach=False), adamw(foreach=True)
    on_cpu = bench.device == "cpu"
    # the faster of torch's two paths in Python
    base, name = (single, "AdamW(foreach=False)") if on_cpu else (together, "AdamW(foreach=True)")
    rows: list[tuple[str, Make, float | None]] = [
        ("SPAM()", spam(), 1.5 if on_cpu else 1.1),
        ("SPAM(foreach=True)", spam(foreach=True), None),
        ("SPAM(fused=True)", spam(fused=True), None),
        ("SPAM(capturable=True)", spam(capturable=True), None),
        ("SPAM(density=0.25)", spam(density=0.25), None),
        ("SPAM(state_dtype='bfloat16')", spam(state_dtype="bfloat16"), None),
        ("SPAM(state_dtype='8bit')", spam(state_dtype="8bit"), None),
        ("StableSPAM()", stable_spam(), None),
        ("AdamW(foreach=True)" if on_cpu else "AdamW(foreach=False)", together if on_cpu else single, None),
        ("AdamW(fused=True)", adamw(fused=True), None),
    ]
    ratios = []
    for what, make, bar in rows:
        if only == what or not only:
            one, other = bench.optimizer(base), bench.optimizer(make)
            ratios.append(bench.ratio(f"{what} / {name}", one.step, other.step, bar))
            print(f"{what}: {bytes_of_state(other) / bytes_of_state(one):.3f} of AdamW's bytes of state", flush=True)
            del one, other
            gc.collect()
    for what, make, bar in ((name, base, 1.25), ("AdamW(fused=True)", adamw(fused=True), None)):
        if only in ("", "SpikeAware()"):
            one, other = bench.optimizer(make), bench.optimizer(make)
            ratios.append(bench.ratio(f"{what} in SpikeAware() / {what}", one.step, spike_aware(other), bar))
            del one, other
            gc.collect()
    return ratios


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="Measure the steps of optimizers, as ratios.")
    parser.add_argument("--quick", action="store_true", help="few and short turns; prints, and writes no file")
    parser.add_argument("--gpu", action="store_true", help="1 billion weights on a GPU")
    parser.add_argument("--only", default="", help="measure only this row, such as 'SPAM()'; no file")
    arguments = parser.parse_args()
    be_quiet()
    steps, turns = (3, 3) if arguments.quick else (5, 11)
    device, weights = ("cuda", 10**9) if arguments.gpu else ("cpu", 10**7)
    ratios = measure(Bench(weights, device, steps, turns), arguments.only)
    show(ratios)
    if not arguments.quick and not arguments.only:
        write(RESULTS / ("optimizers-gpu.json" if arguments.gpu else "optimizers.json"), ratios=ratios)


if __name__ == "__main__":
    main()
