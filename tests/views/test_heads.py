"""`agc` leaves alone the layers that make a model's output, and no other matrix."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hf_gradclip.optim import SGD
from hf_gradclip.strategy import Units
from hf_gradclip.views.zero import Pieces
from tests.views.models import ALL, Model, Said, Timm, large, left_alone, mlp

NAMES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "timm ConvNeXt": (lambda: Model("stages.0.fc", "head.norm", "head.fc"), ["head.fc"]),
    "timm, hidden layer": (lambda: Model("stem", "head.pre_logits.fc", "head.fc"), ["head.fc"]),
    "timm DeiT": (lambda: Model("blocks.0.fc", "head", "head_dist"), ["head", "head_dist"]),
    "timm LeViT": (lambda: Model("stem", "head.linear", "head_dist.linear"), ["head.linear", "head_dist.linear"]),
    "timm EfficientNet": (lambda: Model("blocks.0.fc", "conv_head", "classifier"), ["classifier"]),
    "torchvision ViT": (lambda: Model("encoder", "heads.head"), ["heads.head"]),
    "torchvision ViT, hidden layer": (lambda: Model("encoder", "heads.pre_logits", "heads.head"), ["heads.head"]),
    "torchvision VGG": (lambda: Model("features.0", classifier=mlp(0, 3, 6)), ["classifier.6"]),
    "torchvision MobileNetV3": (lambda: Model("features.0", classifier=mlp(0, 3)), ["classifier.3"]),
    "torchvision SqueezeNet": (lambda: Model("features.0", "classifier.1.conv"), ["classifier.1.conv"]),
    "torchvision GoogLeNet": (lambda: Model("aux1.fc1", "aux1.fc2", "fc"), ["aux1.fc2", "fc"]),
    "torchvision Faster R-CNN": (
        lambda: Model("backbone", "roi_heads.box_head.fc6", "roi_heads.box_predictor.cls_score"),
        ["roi_heads.box_predictor.cls_score"],
    ),
    "a GPT with heads of attention": (
        lambda: Model("wte", "sa_head.key", "sa_head.value", "sa_heads.heads.0.value", "lm_head"),
        ["lm_head"],
    ),
    "an fc that is a list": (lambda: Model("stem", "fc.0", "fc.1", "head"), ["head"]),
    "an fc before the output": (lambda: Model("fc", "output"), []),
    "RoBERTa": (lambda: Model("roberta", "classifier.dense", "classifier.out_proj"), ["classifier.out_proj"]),
    "DistilBERT": (lambda: Model("distilbert", "pre_classifier", "classifier"), ["classifier"]),
    "ModernBERT": (lambda: Model("model.layers.0", "head.dense", "classifier"), ["classifier"]),
    "BART": (
        lambda: Model("model.shared", "classification_head.dense", "classification_head.out_proj"),
        ["classification_head.out_proj"],
    ),
    "XLNet": (lambda: Model("transformer.layer.0", "sequence_summary.summary", "logits_proj"), ["logits_proj"]),
    "XLM": (lambda: Model("transformer.layer.0", "sequence_summary.summary"), ["sequence_summary.summary"]),
    "GPT-2 with two heads": (
        lambda: Model("transformer.h.0", "lm_head", "multiple_choice_head.summary"),
        ["lm_head", "multiple_choice_head.summary"],
    ),
    "DETR": (
        lambda: Model("model", "class_labels_classifier", "bbox_predictor.layers.0", "bbox_predictor.layers.1"),
        ["bbox_predictor.layers.1", "class_labels_classifier"],
    ),
    "UPerNet": (
        lambda: Model("backbone", "decode_head.classifier", "decode_head.bottleneck"),
        ["decode_head.classifier"],
    ),
    "Switch Transformers": (lambda: Model("encoder.block.0.router.classifier", "lm_head"), ["lm_head"]),
    "additive attention": (lambda: Model("encoder", "attention.score", "fc"), ["fc"]),
    "a Sequential": (lambda: Model("body", head=mlp(0, 2)), ["head.2"]),
    "a list": (lambda: Model("body", heads=nn.ModuleList([nn.Linear(4, 2), mlp(0, 2)])), ["heads.0", "heads.1.2"]),
    "by task": (
        lambda: Model("body", head=nn.ModuleDict({"a": mlp(0, 2), "b": nn.Linear(4, 2)})),
        ["head.a.2", "head.b"],
    ),
    "by words": (lambda: Model("body", "domain_classifier", "ctc_head"), ["ctc_head", "domain_classifier"]),
    "all below one name": (
        lambda: Model("classifier.conv1", "classifier.layers.0.fc", "classifier.fc"),
        ["classifier.fc"],
    ),
    "no name": (lambda: Model("a", "b.0", "out"), []),
}
"""A model without a word about itself, and its heads."""


@pytest.mark.parametrize(("make", "heads"), NAMES.values(), ids=NAMES)
def test_by_name(make, heads) -> None:
    assert left_alone(make()) == heads


SAYS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "one": (lambda: Timm("stem", "head.fc", heads=("head.fc",)), ["head.fc"]),
    "an unusual one": (lambda: Timm("stem", "classif", heads=("classif",)), ["classif"]),
    "two": (lambda: Timm("stem", "top", "top_dist", heads=("top", "top_dist")), ["top", "top_dist"]),
    "a module of layers": (lambda: Timm("stem", "top.fc1", "top.fc2", heads=("top",)), ["top.fc2"]),
    "names do not count beside it": (lambda: Timm("score.fc", "head.0", "fc", heads=("fc",)), ["fc"]),
    "vague names neither": (lambda: Timm("stem", "head.0", "fc", heads=("fc",)), ["fc"]),
    "none, in a part": (lambda: Model("out", "fc", backbone=Timm("stem", "head.0", heads=())), ["fc"]),
    "the output of tokens": (lambda: Said("model", "vocabulary", output="vocabulary"), ["vocabulary"]),
    "the same, in a part": (lambda: Model("a", decoder=Said("b", "proj_out", output="proj_out")), ["decoder.proj_out"]),
    "one, and a name": (
        lambda: Said("b", "proj_out", "value_head.summary", output="proj_out"),
        ["proj_out", "value_head.summary"],
    ),
    "a layer after lm_head": (lambda: Said("model", "lm_head.dense", "decoder", output="decoder"), ["decoder"]),
}
"""A model that tells its heads by methods, and these."""


@pytest.mark.parametrize(("make", "heads"), SAYS.values(), ids=SAYS)
def test_by_what_the_model_says(make, heads) -> None:
    assert left_alone(make()) == heads


def test_another_method_of_that_name_says_nothing() -> None:
    class Named(Model):
        def get_classifier(self, name: str) -> nn.Module:
            return self.get_submodule(name)

    assert left_alone(Named("stem", "head.0", "head.1")) == ["head.1"]


def test_a_method_that_fails_says_nothing() -> None:
    class Failing(Model):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert left_alone(Failing("stem", "fc")) == ["fc"]


def test_a_table_of_inputs_that_an_encoder_gives_as_its_output() -> None:
    class Encoder(Said):
        get_input_embeddings = Said.get_output_embeddings

    model = Said("body", "out", output="out")
    model.encoder = Encoder("table", "layer", output="table")
    assert left_alone(model) == ["out"]


def test_a_wrapper_that_hands_on_what_it_is_asked() -> None:
    class Forwarding(Model):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("backbone"), name)

    model = Forwarding("aux_head", backbone=Timm("stem", "top", heads=("top",)))
    assert left_alone(model) == ["aux_head", "backbone.top"]


def test_a_head_is_left_alone_though_the_rest_is_frozen() -> None:
    model = Model("body.fc", "top", "fc")
    model.body.requires_grad_(False)
    assert left_alone(model) == ["fc"]


def test_a_frozen_head_is_no_reason_to_look_for_another() -> None:
    model = Model("blocks.mlp.fc", "blocks.mlp.top", "fc")
    model.fc.requires_grad_(False)
    assert left_alone(model) == []


def test_a_tied_head_and_its_embedding_whatever_the_model_says() -> None:
    model = Model("body", embedding=nn.Embedding(4, 4), lm_head=nn.Linear(4, 4, bias=False))
    model.lm_head.weight = model.embedding.weight
    assert left_alone(model) == ["embedding"]


def test_a_parametrized_head() -> None:
    """The magnitudes and the directions of a head with weight normalization, and not those of other layers."""
    model = Model("body", "head.mlp", "head.last")
    for layer in (model.body, model.head.last):
        parametrizations.weight_norm(layer)
    assert left_alone(model) == ["head.last.parametrizations.weight"] * 2


def test_by_the_names_of_parameters_alone() -> None:
    """As an optimizer has them."""
    for make, heads in (NAMES["RoBERTa"], NAMES["torchvision VGG"], NAMES["timm ConvNeXt"], NAMES["XLNet"]):
        model = make()
        large(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        SGD(list(model.named_parameters()), lr=1.0, clip=ALL).step()
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
        moved = [name for name, p in matrices if (p - before[name]).abs().max() > 1e-3]
        assert moved == [f"{head}.weight" for head in heads]


def test_parameters_that_lie_elsewhere_as_under_zero_3() -> None:
    model = Model("roberta", "classifier.dense", "classifier.out_proj")
    named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    pieces = Pieces(model, named, SimpleNamespace(parts=[]), torch.device("cpu"))
    pieces.divide(Units())
    assert pieces.layout.unit_S.tolist() == [True] * 8 + [False]
