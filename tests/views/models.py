"""Models that have nothing but the names and the order of layers of known ones, and what `agc` leaves alone of them."""

from __future__ import annotations

import torch
from torch import nn

from hf_gradclip import Clipper

ALL = "agc:clip_factor=1e-9"
"""Scales every gradient that it does not leave alone."""


class Model(nn.Module):
    """Layers under names. Dots make modules in modules, as a number does in a ModuleList."""

    def __init__(self, *layers: str, **given: nn.Module) -> None:
        super().__init__()
        for path in layers:
            *outer, name = path.split(".")
            module: nn.Module = self
            for part in outer:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.add_module(name, nn.Conv2d(4, 4, 1) if "conv" in name else nn.Linear(4, 4))
        for name, layer in given.items():
            self.add_module(name, layer)


class Said(Model):
    """Tells the layer of its output, as transformers do."""

    def __init__(self, *layers: str, output: str) -> None:
        super().__init__(*layers)
        self.output = output

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.output)


class Timm(Model):
    """Tells its heads as timm does: one, or a tuple; none is an Identity."""

    def __init__(self, *layers: str, heads: tuple[str, ...]) -> None:
        super().__init__(*layers)
        self.heads_are = heads

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        found = tuple(self.get_submodule(name) for name in self.heads_are)
        return found if len(found) > 1 else (*found, nn.Identity())[0]


def mlp(*numbers: int) -> nn.Sequential:
    """Linear layers at these places, ReLU at the others."""
    return nn.Sequential(*(nn.Linear(4, 4) if i in numbers else nn.ReLU() for i in range(max(numbers) + 1)))


def large(model: nn.Module) -> None:
    """Give every parameter a gradient of ones, far above the limits of ALL."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def same(model: nn.Module) -> list[str]:
    """The layers whose trained matrices still have the gradients of `large`."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad]
    return sorted(name.rpartition(".")[0] for name, p in matrices if torch.equal(p.grad, torch.ones_like(p)))


def left_alone(model: nn.Module) -> list[str]:
    """The layers whose matrices `agc` does not clip."""
    large(model)
    Clipper.for_model(model, ALL).step()
    return same(model)
