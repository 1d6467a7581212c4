"""Changes before the strategy wraps a module."""

from __future__ import annotations

from lightning_cl.core.configure import before_wrapping, leave_configure_model
from toys import ToyModule


class Late(ToyModule):
    """Builds its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def configure_model(self) -> None:
        self.made.append("network")


def test_at_once_where_the_network_is_there() -> None:
    """A module without `configure_model` is changed at once, and one that says so."""
    made: list[str] = []
    before_wrapping(ToyModule(), lambda: made.append("change"))
    late = Late()
    before_wrapping(late, lambda: late.made.append("change"), built=True)
    assert made == late.made == ["change"]


def test_behind_the_network_in_the_order_of_calls() -> None:
    """Changes wait for `configure_model`, once; the next call of it is the module's own."""
    late = Late()
    before_wrapping(late, lambda: late.made.append("first"))
    before_wrapping(late, lambda: late.made.append("second"))
    late.configure_model()
    assert late.made == ["network", "first", "second"]
    assert "configure_model" not in late.__dict__
    late.configure_model()
    assert late.made[3:] == ["network"]


def test_a_fit_that_ended_early_leaves_nothing() -> None:
    """The method is that of the class again."""
    late = Late()
    before_wrapping(late, lambda: late.made.append("change"))
    leave_configure_model(late)
    late.configure_model()
    assert late.made == ["network"]
