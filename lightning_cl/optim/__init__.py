"""Optimizers and what acts on the state of any."""

from lightning_cl.functional.reset_state import reset_state
from lightning_cl.optim.mezo import MeZO
from lightning_cl.optim.spam import SPAM
from lightning_cl.optim.stable_spam import StableSPAM
from lightning_cl.optim.states import second_moment

__all__ = ["SPAM", "MeZO", "StableSPAM", "reset_state", "second_moment"]
