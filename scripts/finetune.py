"""Fine-tune a causal language model with clipping by strategy.

    accelerate launch scripts/finetune.py --clip adaptive
    accelerate launch scripts/finetune.py configs/runs/adagc.yaml --learning_rate 1e-3
    accelerate launch scripts/finetune.py --clip adagc --model_name_or_path NAME --dataset_name NAME --lora_r 8

Without a model or data nothing is fetched: a small Llama is made from a config, a tokenizer is trained on the spot,
and the text is the source of Python's own standard library.
"""

from __future__ import annotations

import itertools
import json
import sys
import sysconfig
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_gradclip import ClipArguments, GradClipTrainer, optim, yaml_file

END = "<|endoftext|>"


@dataclass
class ClipFlags(ClipArguments):
    """How to clip: by `adaptive`, with a record, where nothing else is said."""

    clip: str | None = field(
        default="adaptive", metadata={"help": "Strategy, preset or YAML file; 'none' measures only."}
    )
    clip_record: str | None = field(
        default="true",
        metadata={
            "help": "Keep every step's norms and scales in OUTPUT_DIR/gradclip; text adds the examples of a spike.",
            "choices": ["true", "false", "text"],
        },
    )


@dataclass
class DataArguments:
    """What to train on what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A causal LM; none makes a small Llama."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub, with a 'text' column."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .json, .jsonl, .csv or .parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    validation_share: float = field(default=0.05, metadata={"help": "Split off for evaluation where no set is given."})
    block_size: int = field(default=128, metadata={"help": "Tokens per example."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer trained on the spot."})
    max_text_bytes: int = field(default=4_000_000, metadata={"help": "How much of the standard library to read."})
    max_eval_samples: int = field(default=128, metadata={"help": "Examples in an evaluation at most."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters on all linear layers; 0 trains all."})


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments, with defaults that finish in minutes on two CPU cores."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Checkpoints and logs."})
    max_steps: int = field(default=150, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples per process and step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Examples per process in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps to the peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled weight decay."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=50, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=75, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ... or none."})
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "An optimizer of hf_gradclip.optim in the place of --optim.",
            "choices": ["adamw", "adam", "rmsprop", "momentum", "nesterov"],
        },
    )
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step."})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = (
                True  # else two processes on a machine without GPUs are two runs that know nothing of each other
            )
        super().__post_init__()


def parse(argv: list[str]) -> tuple[ClipFlags, DataArguments, RunArguments]:
    """Read the command line; a first argument that ends in .yaml gives defaults which later flags win over."""
    parser = HfArgumentParser((ClipFlags, DataArguments, RunArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = yaml_file.load(Path(argv[0]).read_text("utf-8")) or {}
        if not isinstance(values, dict):
            parser.error(f"{argv[0]}: must hold lines of key: value, the flags without their dashes")
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(values) - known)
        if unknown:
            parser.error(f"{argv[0]}: unknown keys {', '.join(unknown)}")
        deep = [key for key, value in values.items() if isinstance(value, dict | list)]
        if deep:
            parser.error(f"{argv[0]}: {deep[0]} must be one value. Put it into a file of its own: {deep[0]}: its.yaml")
        of_clip = {f.name for f in fields(ClipFlags)}  # None has a meaning there; elsewhere it means the default
        parser.set_defaults(**{key: None for key, value in values.items() if value is None and key in of_clip})
        from_file = [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]
        argv = from_file + argv[1:]
    for before, word in itertools.pairwise(argv):
        if word.endswith((".yaml", ".yml")) and not before.startswith("--") and not word.startswith("-"):
            parser.error(f"{word}: a file of arguments comes first, before all flags")
    clip_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    return clip_args, data_args, args


def standard_library_text(limit: int) -> list[str]:
    """The source files of Python's standard library, in a fixed order, `limit` bytes at most."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    texts: list[str] = []
    for path in files:
        if limit <= 0 or "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text("utf-8", errors="replace")[:limit]
        texts.append(text)
        limit -= len(text)
    return texts


def load_texts(args: DataArguments, seed: int) -> DatasetDict:
    """Train and validation texts: of the hub, of files, or of the standard library."""
    if args.dataset_name:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    elif args.train_file:
        files = {"train": args.train_file} | ({"validation": args.validation_file} if args.validation_file else {})
        kind = {".txt": "text", ".jsonl": "json"}.get(Path(args.train_file).suffix, Path(args.train_file).suffix[1:])
        data = load_dataset(kind, data_files=files)
    else:
        data = DatasetDict(train=Dataset.from_dict({"text": standard_library_text(args.max_text_bytes)}))
    if args.text_column not in data["train"].column_names:
        raise SystemExit(
            f"--text_column {args.text_column}: the data has {', '.join(data['train'].column_names)}. Name one of them."
        )
    if "validation" not in data:
        split = data["train"].train_test_split(test_size=args.validation_share, seed=seed)
        data = DatasetDict(train=split["train"], validation=split["test"])
    return data


def load_tokenizer(args: DataArguments, texts: list[str]) -> Any:
    """The model's tokenizer, or a byte-level BPE trained on the texts."""
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=args.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def load_model(args: DataArguments, tokenizer: Any) -> Any:
    """A pretrained causal LM, or a Llama of about four million parameters; with LoRA if asked for."""
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=max(args.block_size, 128),
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=True,
            )
        )
    if args.lora_r:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def to_blocks(data: DatasetDict, tokenizer: Any, args: DataArguments) -> DatasetDict:
    """Tokenize, join, and cut into blocks of equal length."""

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        tokens = [t for text in batch[args.text_column] for t in tokenizer(text)["input_ids"] + end]
        whole = len(tokens) // args.block_size * args.block_size
        blocks = [tokens[i : i + args.block_size] for i in range(0, whole, args.block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    columns = data["train"].column_names
    return data.map(tokenize, batched=True, remove_columns=columns, desc="tokenizing")


def optimizer_of(args: RunArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer of --optimizer with its hyperparameters, as the Trainer takes it; None leaves it to --optim."""
    if args.optimizer is None:
        return None
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    known: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "adamw": (optim.AdamW, adam),
        "adam": (optim.Adam, adam),
        "rmsprop": (optim.RMSprop, {}),
        "momentum": (optim.SGD, {"momentum": 0.9}),
        "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    }
    cls, settings = known[args.optimizer]
    return cls, {"lr": args.learning_rate, **settings}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; the metrics of the run."""
    clip_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the texts"):
        texts = load_texts(data_args, args.seed)
        tokenizer = load_tokenizer(data_args, texts["train"][data_args.text_column])
        data = to_blocks(texts, tokenizer, data_args)
    model = load_model(data_args, tokenizer)
    trainer = GradClipTrainer(
        model=model,
        args=args,
        clip=clip_args.clip_config(args.max_grad_norm),
        train_dataset=data["train"],
        eval_dataset=data["validation"].select(range(min(data_args.max_eval_samples, len(data["validation"])))),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=optimizer_of(args),
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        checkpoint = get_last_checkpoint(args.output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = trainer.evaluate()["eval_loss"]
    metrics = {"eval_loss": after, **result.metrics}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == 0:
            metrics["eval_loss_before"] = entry["eval_loss"]
    if trainer.clipper is not None:
        metrics |= {f"clip/{key}": value for key, value in trainer.clipper.report.summary().items()}
    if trainer.update_clipper is not None:
        metrics |= {f"clip_update/{key}": value for key, value in trainer.update_clipper.report.summary().items()}
    if trainer.is_world_process_zero():
        before = f"{metrics['eval_loss_before']:.3f} -> " if "eval_loss_before" in metrics else ""
        print(f"eval loss {before}{after:.3f}; saved to {args.output_dir}")
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    return metrics


if __name__ == "__main__":
    main()
