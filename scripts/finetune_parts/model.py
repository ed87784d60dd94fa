"""The model to train and its tokenizer: pretrained, of a GGUF file, or made on the spot; with LoRA if asked for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetune_parts.flags import DataArguments
from finetune_parts.texts import SIZES, TEXT
from finetune_parts.words import InputError, in_one_line
from hf_gradclip.spec import nearest

END = "<|endoftext|>"
GGUF = ".gguf"
WRONG_MODEL = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What from_pretrained raises for a name or a file that is none."""


def load_tokenizer(args: DataArguments, texts: list[str]) -> Any:
    """The model's tokenizer, or a byte-level BPE trained on the texts.

    Raises:
        InputError: where there is no such model.
    """
    if args.model_name_or_path:
        _insist_on_model(args)
        with in_one_line(f"--model_name_or_path {args.model_name_or_path}", *WRONG_MODEL):
            name, how = _place(args.model_name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(name, **how)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=args.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def load_model(args: DataArguments, tokenizer: Any) -> Any:
    """A pretrained causal LM, or a Llama of about four million parameters; with LoRA if asked for.

    Raises:
        InputError: where there is no such model, a package is missing, or no layer has a name in --lora_targets.
    """
    model = _pretrained(args) if args.model_name_or_path else _small_llama(args, tokenizer)
    return _with_adapters(model, args) if args.lora_r else model


def _place(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained is given: a folder or a name, and the file where it is a GGUF file."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == GGUF else (name, {})


def _insist_on_model(args: DataArguments) -> None:
    """Stop where it can be told at once that there is no such model."""
    name = str(args.model_name_or_path)
    if name.endswith(GGUF):
        if not Path(name).is_file():
            raise InputError(f"--model_name_or_path {name}: no such file.")
        _insist_on_package("gguf", f"--model_name_or_path {name}", "pip install gguf")
        if args.load_in_4bit:
            raise InputError(
                "--load_in_4bit true: a GGUF file is turned into whole weights. Give a model in safetensors."
            )
    elif name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"--model_name_or_path {name}: no such folder.")
    if args.load_in_4bit:
        _insist_on_package("bitsandbytes", "--load_in_4bit true", "pip install bitsandbytes")
    if args.lora_r:
        _insist_on_package("peft", f"--lora_r {args.lora_r}", "pip install -c constraints.txt -e '.[peft]'")


def _insist_on_package(package: str, flag: str, install: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"{flag}: needs the package {package}, which is not installed: {install}")


def _pretrained(args: DataArguments) -> Any:
    """With LoRA in the precision of its file, else in float32, in which small steps are not rounded away."""
    _insist_on_model(args)
    name, how = _place(str(args.model_name_or_path))
    settings: dict[str, Any] = {"dtype": args.dtype or ("auto" if args.lora_r else "float32"), **how}
    if args.load_in_4bit:
        from accelerate import PartialState
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.dtype in (None, "auto") else getattr(torch, args.dtype),
        )
        settings["device_map"] = {"": PartialState().device}
    with in_one_line(f"--model_name_or_path {args.model_name_or_path}", *WRONG_MODEL):
        model = AutoModelForCausalLM.from_pretrained(name, **settings)
    return _without_marks(model) if how else model


def _without_marks(model: Any) -> Any:
    """A model of a GGUF file, whose weights became whole as they were read, so that it may be trained and saved."""
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _small_llama(args: DataArguments, tokenizer: Any) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max(args.block_size or SIZES[TEXT], 128),
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )


def _with_adapters(model: Any, args: DataArguments) -> Any:
    """LoRA on the layers that are named."""
    _insist_on_package("peft", f"--lora_r {args.lora_r}", "pip install -c constraints.txt -e '.[peft]'")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets: Any = args.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        layers = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2]) if part}
        for name in targets:
            if name not in layers and not any(layer.endswith(f".{name}") for layer in layers):
                near = nearest(name, {layer for layer in layers if "." not in layer})
                raise InputError(f"--lora_targets {args.lora_targets}: no layer is called {name}.{near}")
    with in_one_line(f"--lora_targets {args.lora_targets}", ValueError):
        return get_peft_model(
            model,
            LoraConfig(
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
