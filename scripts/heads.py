"""Which layers `agc` leaves alone in models of timm, torchvision and transformers, and whether they are the heads.

    python scripts/heads.py
    python scripts/heads.py --library transformers

Every gradient is made far too large and clipped; what did not change was left alone. What is right, timm's own
`get_classifier()` says; for the others it is written here by hand. A library that is not installed is said and left
out. The exit code is 1 where a head is clipped or an inner layer left alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_gradclip import Clipper

TIMM = (
    "resnet18", "resnetv2_50", "vgg11", "densenet121", "mobilenetv3_small_050", "efficientnet_b0", "nf_resnet26",
    "dm_nfnet_f0", "regnetx_002", "convnext_atto", "convnextv2_atto", "swin_tiny_patch4_window7_224",
    "maxvit_rmlp_pico_rw_256", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s",
    "caformer_s18", "mixer_s32_224", "coat_lite_tiny", "crossvit_tiny_240", "repvit_m0_9", "beit_base_patch16_224",
    "poolformer_s12", "xcit_nano_12_p16_224",
)  # fmt: skip
TWO_IN_ONE = {"repvit_m0_9": ("head.head.l", "head.head_dist.l")}
"""Where what timm's `get_classifier()` gives is one module of two heads."""

TORCHVISION = {
    "resnet18": ("fc",),
    "vgg11": ("classifier.6",),
    "alexnet": ("classifier.6",),
    "squeezenet1_1": ("classifier.1",),
    "densenet121": ("classifier",),
    "googlenet": ("fc", "aux1.fc2", "aux2.fc2"),
    "mobilenet_v3_small": ("classifier.3",),
    "efficientnet_b0": ("classifier.1",),
    "regnet_y_400mf": ("fc",),
    "convnext_tiny": ("classifier.2",),
    "swin_t": ("head",),
    "vit_b_16": ("heads.head",),
    "maxvit_t": ("classifier.5",),
}

BERT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
DISTILBERT = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
XLNET = {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
XLM = {"vocab_size": 64, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 64}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
SWITCH = {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {"vocab_size": 64, "d_model": 16, **LAYERS, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
WHISPER = {**BART, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
VIT = {**BERT, "image_size": 16, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
REGNET = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "groups_width": 4, "embedding_size": 8}

TRANSFORMERS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("BertForSequenceClassification", BERT, ("classifier",)),
    ("RobertaForSequenceClassification", BERT, ("classifier.out_proj",)),
    ("DistilBertForSequenceClassification", DISTILBERT, ("classifier",)),
    ("ModernBertForSequenceClassification", {**BERT, "pad_token_id": 0}, ("classifier",)),
    ("BartForSequenceClassification", BART, ("classification_head.out_proj",)),
    ("T5ForSequenceClassification", T5, ("classification_head.out_proj",)),
    ("XLNetForSequenceClassification", XLNET, ("logits_proj",)),
    ("XLMForSequenceClassification", XLM, ("sequence_summary.summary",)),
    ("LlamaForSequenceClassification", LLAMA, ("score",)),
    ("BertForTokenClassification", BERT, ("classifier",)),
    ("BertForQuestionAnswering", BERT, ("qa_outputs",)),
    ("GPT2DoubleHeadsModel", GPT2, ("multiple_choice_head.summary", "transformer.wte")),
    ("BertForPreTraining", BERT, ("bert.embeddings.word_embeddings", "cls.seq_relationship")),
    ("BertForMaskedLM", BERT, ("bert.embeddings.word_embeddings",)),
    ("RobertaForMaskedLM", {**BERT, "tie_word_embeddings": False}, ("lm_head.decoder",)),
    ("ModernBertForMaskedLM", {**BERT, "pad_token_id": 0, "tie_word_embeddings": False}, ("decoder",)),
    ("ElectraForMaskedLM", {**BERT, "embedding_size": 16}, ("electra.embeddings.word_embeddings",)),
    ("LlamaForCausalLM", LLAMA, ("lm_head",)),
    ("T5ForConditionalGeneration", T5, ("shared",)),
    ("SwitchTransformersForConditionalGeneration", SWITCH, ("shared",)),
    ("BartForConditionalGeneration", BART, ("model.shared",)),
    ("WhisperForConditionalGeneration", WHISPER, ("model.decoder.embed_tokens",)),
    ("ViTForImageClassification", VIT, ("classifier",)),
    ("DeiTForImageClassificationWithTeacher", VIT, ("cls_classifier", "distillation_classifier")),
    ("SwinForImageClassification", SWIN, ("classifier",)),
    ("ConvNextForImageClassification", CONVNEXT, ("classifier",)),
    ("RegNetForImageClassification", REGNET, ("classifier.1",)),
)
"""A class, the fields of a tiny configuration, and its heads; a tied one under the name of the embedding."""


def left_alone(model: nn.Module) -> list[str]:
    """The layers with a trained matrix whose gradient `agc` does not scale, though it is far above every limit."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.ndim > 1 and not name.endswith("bias")}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    Clipper.for_model(model, "agc:clip_factor=1e-9").step()
    same = [name for name, p in matrices.items() if p.grad is not None and torch.equal(p.grad, torch.ones_like(p))]
    return sorted({name.rpartition(".")[0] for name in same})


def said_by_timm(model: Any) -> tuple[str, ...]:
    """The layer in what `get_classifier()` gives, in each of its entries where that is a list: its last matrix."""
    answer = model.get_classifier()
    names = {id(module): name for name, module in model.named_modules()}
    modules = [answer] if isinstance(answer, nn.Module) and not isinstance(answer, nn.ModuleList) else list(answer)
    matrices = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim > 1]
    inside = ([m for m in matrices if f"{m}.".startswith(f"{names[id(module)]}.")] for module in modules)
    return tuple(layers[-1] for layers in inside if layers)


def load_torchvision() -> None:
    """Load torchvision, if it is there, for itself and for the others, which ask for it.

    Its models are plain Python. Where its compiled part is made for another torch (CUDA, beside torch for CPUs) the
    import asks for two operators of that part, which no model here calls.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        print("torchvision without its compiled part, which is made for another torch")
        importlib.import_module("torchvision")


def models_of(library: str) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Each model of a library, small and not trained, with the names of its heads."""
    module = importlib.import_module(library)
    if library == "timm":
        for name in TIMM:
            model = module.create_model(name, pretrained=False)
            yield name, model, TWO_IN_ONE.get(name) or said_by_timm(model)
    elif library == "torchvision":
        models = importlib.import_module("torchvision.models")
        for name, heads in TORCHVISION.items():
            extra = {"init_weights": False} if name == "googlenet" else {}  # else it warns, and draws them for long
            yield name, models.get_model(name, weights=None, **extra), heads
    else:
        module.logging.set_verbosity_error()
        for name, fields, heads in TRANSFORMERS:
            kind = getattr(module, name)
            yield name, kind(kind.config_class(**fields)), heads


def wrong(found: Iterable[str], heads: Iterable[str]) -> list[str]:
    """In words which heads are clipped, and what else is left alone."""
    clipped, others = sorted({*heads} - {*found}), sorted({*found} - {*heads})
    return [f"{name} is clipped" for name in clipped] + [f"{name} is left alone" for name in others]


def row(name: str, model: nn.Module, heads: tuple[str, ...]) -> bool:
    """Print what is left alone in a model; whether that is right."""
    found = left_alone(model)
    faults = wrong(found, heads)
    print(f"| {name} | {', '.join(found) or 'nothing'} | {'; '.join(faults) or 'right'} |", flush=True)
    return not faults


def main(words: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description="Which layers agc leaves alone.")
    libraries = ("timm", "torchvision", "transformers")
    parser.add_argument("--library", choices=libraries, action="append", help="of these only")
    parser.add_argument("--model", action="append", help="these models only")
    args = parser.parse_args(words)
    rows = []
    load_torchvision()
    for library in args.library or libraries:
        try:
            version = importlib.import_module(library).__version__
        except ImportError as error:
            print(f"\n{library} is left out: {error}")
            continue
        print(f"\n| {library} {version} | left alone | so it is |\n|---|---|---|")
        rows += [row(*model) for model in models_of(library) if not args.model or model[0] in args.model]
    print(f"\n{len(rows)} models, {rows.count(False)} wrong")
    return int(not all(rows))


if __name__ == "__main__":
    sys.exit(main())
