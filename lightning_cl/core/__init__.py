"""The mechanism all methods share: tasks, events, the step pipeline, batches, parameter state."""

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.state import ParameterState
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task

__all__ = ["BatchAdapter", "ContinualCallback", "MethodCard", "ParameterState", "Task", "TaskEvents", "TaskStream"]
