"""Optimizers and what acts on the state of any."""

from lightning_cl.optim.spam import SPAM
from lightning_cl.optim.states import reset_state, second_moment

__all__ = ["SPAM", "reset_state", "second_moment"]
