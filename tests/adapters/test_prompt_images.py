"""Prompts in front of the patches of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from transformers import ConvNextConfig, ConvNextModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from lightning_cl import L2P, DualPrompt, ProgressivePrompts, SPrompts, Task, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.functional import key_similarities
from toys import trainer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_vit() -> ViTModel:
    """Return a network for images of 8 x 8 in four patches, with large weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.3, **SIZES)).eval()


class ImageToy(LightningModule):
    """A classifier of images as users write it, around a network that was loaded: in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.head = torch.nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vit(images).last_hidden_state[:, 0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images() -> TensorDataset:
    """Return 32 images of four classes."""
    labels = torch.arange(32) % 4
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(noise + labels[:, None, None, None], labels)
    data.targets = labels  # type: ignore[attr-defined]
    return data


def test_prompts_stand_in_front_of_the_patches() -> None:
    """L2P: those with the keys nearest to the class token of the network alone, behind the embedding stage, by hand."""
    module, plain, pixels = ImageToy(), tiny_vit(), images()[:5][0]
    prompts = L2P(4, length=2, top_k=2).attach(module)
    found = module.vit(pixels, output_hidden_states=True)
    with torch.no_grad():
        query = plain(pixels).last_hidden_state[:, 0]
        chosen = key_similarities(query, prompts.keys).topk(2).indices
        plain.embeddings.register_forward_hook(
            lambda stage, args, output: torch.cat([prompts.tokens[chosen].flatten(1, 2), output], 1)
        )
        expected = plain(pixels).last_hidden_state[:, 4:]
        torch.testing.assert_close(found.last_hidden_state, expected)
        torch.testing.assert_close(found.pooler_output, plain.pooler(expected))
    assert all(states.shape == (5, 5, 16) for states in found.hidden_states)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("query", ["cls", "mean"])
@pytest.mark.parametrize("kind", [L2P, SPrompts])
def test_a_fit_moves_prompts(kind: Any, query: Any, tmp_path: Path) -> None:
    """Over two tasks of images; the network stays, and the first task's own prompt moves in its task alone."""
    module, method = ImageToy(), kind(length=2, query=query)
    fresh = method.attach(ImageToy(), 2)
    before = {name: p.clone() for name, p in module.vit.named_parameters()}
    stream = TaskStreamDataModule(images(), scenario=ClassIncremental(n_tasks=2), batch_size=8, epochs_per_task=1)
    trainer(tmp_path, [method]).fit(module, datamodule=stream)
    assert (module.vit.prompts.tokens - fresh.tokens).abs().max() > 1e-4
    assert all(torch.equal(p, before[name]) for name, p in module.vit.named_parameters() if name in before)


def test_images_that_cannot_be_served() -> None:
    """Prefixes need a cache, which ViT lacks; windows and convolutions are no sequence."""
    with pytest.raises(ValueError, match=r"that of `ViTModel` takes none.*`L2P`"):
        DualPrompt([0], [1], num_tasks=1).attach(ImageToy())
    swin = SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    convolutions = ConvNextConfig(num_channels=1, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
    for network in (SwinModel(swin), ConvNextModel(convolutions)):
        module = LightningModule()
        module.network = network
        with pytest.raises(ValueError, match=rf"such as `ViTModel`; `{type(network).__name__}` is neither"):
            ProgressivePrompts(2, num_tasks=1).attach(module)


def test_an_embedding_stage_with_more_outputs() -> None:
    """What tells sizes of the image beside the hidden states is refused in the first forward."""

    class Sizes(torch.nn.Module):
        def forward(self, pixels: Tensor, **_: Any) -> Any:
            return pixels.new_ones(len(pixels), 5, 16), (2, 2)

    module = ImageToy()
    patches = module.vit.embeddings.patch_embeddings
    module.vit.embeddings = Sizes()
    module.vit.embeddings.patch_embeddings = patches
    ProgressivePrompts(2, num_tasks=1).attach(module)
    module.current_task = Task(0, "images")
    with pytest.raises(ValueError, match=r"embedding stage that returns hidden states alone, and `Sizes` returns more"):
        module(torch.ones(1, 1, 8, 8))
