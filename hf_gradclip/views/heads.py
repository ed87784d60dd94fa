"""Which layers make a model's output: its heads, which are left alone where gradients are cut into units.

1. What the model says: `get_output_embeddings()`, and `get_classifier()` as timm has it, of the model and of every
   module in it. Below a module that answers `get_classifier()` no names are looked at.
2. Names that only heads have (CLEAR), wherever they are but in the blocks of a list or in an attention.
3. Names that heads often have, in the outermost module below wrappers: those with one of WORDS at an end, and VAGUE
   ones where this module has no head by 1 or 2 (ModernBERT's `head` comes before its `classifier`). `fc` is one
   if no single layer comes after it, and it is no list.

Of a module that is not a single layer the names are asked again; where they tell nothing, the last layer with a matrix
is the head (classifier.6 of a VGG, classifier.out_proj of RoBERTa). Each entry of a ModuleList or ModuleDict is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_gradclip.views.trainable import Together, bare

LANGUAGE = frozenset({"lm_head", "embed_out"})
CLEAR = LANGUAGE | {
    # classes, spans, discriminators
    "classifier", "score", "qa_outputs", "logits_proj", "seq_relationship", "discriminator_predictions",
    # boxes, key points, masks
    "class_labels_classifier", "class_embed", "cls_logits", "cls_score", "bbox_embed", "bbox_pred", "bbox_predictor",
    "bbox_reg", "bbox_ctrness", "kps_score_lowres", "mask_fcn_logits",
}  # fmt: skip
VAGUE = frozenset({"head", "heads", "fc", "cls", "last_linear", "sequence_summary", "aux1", "aux2", "AuxLogits"})
WORDS = frozenset({"head", "heads", "classifier", "classifiers", "logits"})
ATTENTION = frozenset({"attention", "attn"})
BEFORE = ATTENTION | {"conv", "mha", "multi", "pre", "proj", "projection", "roi", "sa", "self"}
"""With one of these words in its name (pre_classifier, conv_head, sa_head) a layer comes before the head."""
WRAPPERS = frozenset({"model", "module", "base_model", "pretrained_model"})

Heads = Mapping[str, tuple[str, ...]]
"""By the name of a layer the names of its trained parameters; those are another layer's where the two are tied."""


def heads_of(model: nn.Module | None, named: Sequence[tuple[str, Tensor]]) -> Heads:
    """The heads that are trained.

    Args:
        model: whose layers are looked at; None goes by the names of the parameters alone.
        named: the trained parameters.
    """
    model = _skeleton(named) if model is None else model
    paths = {id(module): bare(f"{path}.")[:-1] for path, module in model.named_modules()}
    names = {id(p): name for name, p in named}
    heads: dict[str, tuple[str, ...]] = {}
    models = [*model.children()] if isinstance(model, Together) else [model]
    for layer in (layer for each in models for layer in _found(each)):
        trained = tuple(names[id(p)] for p in layer.parameters() if id(p) in names)
        if trained:
            heads[paths.get(id(layer), type(layer).__name__)] = trained
    return heads


def _found(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that are heads; some come twice."""
    answers: list[nn.Module] = []
    for module in model.modules():
        output = _answer(module, "get_output_embeddings") or []
        if not answers or output != _answer(module, "get_input_embeddings"):  # an encoder inside may name its table
            answers += output
        answers += _answer(module, "get_classifier") or []
    for found in (*answers, *_by_name(model, VAGUE)):
        yield from _layers(found)


def _answer(module: nn.Module, method: str) -> list[nn.Module] | None:
    """The modules that a module names as its heads; None where it cannot answer."""
    if not hasattr(type(module), method):  # a wrapper hands on what it is asked, and what is wrapped is asked itself
        return None
    try:
        answer: Any = getattr(module, method)()
    except Exception:  # a head that was taken out; another method of that name, whatever that raises
        return None
    return [found for found in (answer if isinstance(answer, (tuple, list)) else (answer,)) if _has_parameters(found)]


def _by_name(model: nn.Module, vague: frozenset[str]) -> Iterator[nn.Module]:
    yield from _clear(model)
    yield from _outermost(model, vague)


def _clear(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with a name that only heads have, wherever they are but in a list or an attention."""
    if _answer(module, "get_classifier") is not None:
        return
    clear = CLEAR - LANGUAGE if _answer(module, "get_output_embeddings") else CLEAR
    for name, child in module.named_children():
        if name in clear and _has_parameters(child):
            yield child
        elif not name.isdigit() and not ATTENTION.intersection(name.split("_")):
            yield from _clear(child)


def _outermost(module: nn.Module, vague: frozenset[str]) -> Iterator[nn.Module]:
    """The modules with the name of a head in the first module below wrappers that has any.

    A wrapper is a module of which one child alone is trained, or has a child with a usual name for what is wrapped.
    """
    if _answer(module, "get_classifier") is not None:
        return
    children = {name: child for name, child in module.named_children() if _has_parameters(child)}
    known = CLEAR & children.keys() or _answer(module, "get_output_embeddings")
    if "fc" in children and (isinstance(children["fc"], nn.ModuleList) or _is_before_a_layer("fc", children)):
        vague -= {"fc"}
    found = [child for name, child in children.items() if _has_word(name) or (name in vague and not known)]
    yield from found
    if not found and not known:
        trained = {name: child for name, child in children.items() if any(p.requires_grad for p in child.parameters())}
        for name, child in trained.items():
            if len(trained) == 1 or name in WRAPPERS:
                yield from _outermost(child, vague)


def _is_before_a_layer(name: str, children: Mapping[str, nn.Module]) -> bool:
    names = [*children]
    return any(_is_layer(children[later]) for later in names[names.index(name) + 1 :])


def _has_word(name: str) -> bool:
    words = name.split("_")
    return bool(WORDS & {words[0], words[-1]}) and name not in CLEAR | VAGUE and not BEFORE.intersection(words)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a head that make its output."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or "modules_to_save" in module._modules:
        for child in module.children():
            yield from _layers(child)
    elif _is_layer(module):
        yield module
    else:
        found = list(_by_name(module, frozenset({"head", "heads"})))
        for inner in found:
            yield from _layers(inner)
        if not found and (last := _last(module)) is not None:
            yield last


def _last(module: nn.Module) -> nn.Module | None:
    """The last layer with a matrix."""
    if _is_layer(module):
        return module
    inner = (_last(child) for child in reversed([*module.children()]))
    return next((layer for layer in inner if layer is not None), module if _has_matrix(module) else None)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer, though it be made of several, as an adapter or a parametrization makes it."""
    if {"base_layer", "parametrizations"} & module._modules.keys():
        return True
    return _has_matrix(module) and ("weight" in module._parameters or not module._modules)


def _has_matrix(module: nn.Module) -> bool:
    shapes = (getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False))  # ZeRO 3 keeps them apart
    return any(len(shape) > 1 for shape in shapes)


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and next(module.parameters(), None) is not None


def _skeleton(named: Sequence[tuple[str, Tensor]]) -> nn.Module:
    """Modules without a class, as the names of parameters tell of them."""
    root = nn.Module()
    for name, p in named:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            child = module._modules.setdefault(part, nn.Module())
            assert child is not None
            module = child
        module._parameters[leaf] = p  # type: ignore[assignment]
    return root
