"""Reference LightningModules and small networks: what the command line and the examples use."""

from lightning_cl.core.schedules import Schedule
from lightning_cl.modules.causal_lm import CausalLM
from lightning_cl.modules.classifier import Classifier
from lightning_cl.modules.language_model import LanguageModel
from lightning_cl.modules.networks import MLP, TextClassifierNetwork
from lightning_cl.modules.pretrained import Quantization
from lightning_cl.modules.sequence_classifier import SequenceClassifier

__all__ = [
    "MLP",
    "CausalLM",
    "Classifier",
    "LanguageModel",
    "Quantization",
    "Schedule",
    "SequenceClassifier",
    "TextClassifierNetwork",
]
