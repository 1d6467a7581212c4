"""Reference LightningModules and small networks: what the command line and the examples use."""

from lightning_cl.modules.classifier import Classifier
from lightning_cl.modules.networks import MLP, TextClassifierNetwork

__all__ = ["MLP", "Classifier", "TextClassifierNetwork"]
