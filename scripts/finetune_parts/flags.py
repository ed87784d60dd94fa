"""The flags of finetune.py. One that is left out is decided by the others: see command_line.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_gradclip import ClipArguments
from hf_gradclip.spec import read_yaml

DTYPES = ["auto", "float32", "bfloat16", "float16"]


@dataclass
class ClipFlags(ClipArguments):
    """How to clip: by `adaptive`, with a record, where nothing else is said."""

    clip: str | None = field(
        default="adaptive",
        metadata={"help": "Strategy, preset or YAML file; 'none' measures only; 'list' prints the strategies."},
    )
    clip_record: str | None = field(
        default=None,
        metadata={
            "help": "Keep every step's norms and scales in OUTPUT_DIR/gradclip; text adds the examples of a spike. "
            "Left out, the file in --clip decides, and else it is true.",
            "choices": ["true", "false", "text"],
        },
    )

    def _record(self) -> Any:
        """True where neither a flag nor the file in `clip` says anything of the record."""
        said = super()._record()
        if said is None and self.clip_record_push is None and not _names_record(self.clip):
            return True
        return said


def _names_record(clip: str | None) -> bool:
    """Whether a spec is a YAML file with a key `record`.

    Raises:
        SpecError: for one that cannot be read.
    """
    if not isinstance(clip, str) or not clip.endswith((".yaml", ".yml")) or not Path(clip).is_file():
        return False
    content = read_yaml(Path(clip))
    return isinstance(content, dict) and "record" in content


@dataclass
class DataArguments:
    """What to train on what."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "A .txt, .md, .tsv, .csv, .json, .jsonl or .parquet file, or a folder of them."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "The column that holds plain text."})
    prompt_column: str = field(default="prompt", metadata={"help": "The column of prompts; the loss leaves them out."})
    completion_column: str = field(default="completion", metadata={"help": "The column of what is to be learnt."})
    messages_column: str = field(
        default="messages",
        metadata={"help": "The column of chats: lists of {role, content}. What the assistant says is learnt."},
    )
    validation_share: float = field(default=0.05, metadata={"help": "Split off for evaluation where no set is given."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per example at most; else 128 for text, 1024 for prompts and chats."}
    )
    packing: bool | None = field(
        default=None,
        metadata={"help": "Fill each example with several documents; else true for text, false for prompts and chats."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer trained on the spot."})
    max_text_bytes: int = field(default=4_000_000, metadata={"help": "How much of the standard library to read."})
    max_eval_samples: int = field(default=128, metadata={"help": "Examples in an evaluation at most."})
    sample_tokens: int = field(
        default=40, metadata={"help": "Tokens of text to write before and after training; 0 writes none."}
    )
    sample_prompt: str | None = field(
        default=None, metadata={"help": "What that text goes on from; else a piece that is held out."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A causal LM: folder, name or .gguf file; none makes a small Llama."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of a pretrained model's weights; else float32, or with LoRA what its file has.",
            "choices": DTYPES,
        },
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_alpha: float = field(default=8, metadata={"help": "Adapters are scaled by LORA_ALPHA / LORA_R."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Layers that get adapters: all-linear, or names such as q_proj,v_proj."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen weights in 4 bits, which needs bitsandbytes."}
    )


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments, with defaults that finish in minutes on two CPU cores."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Checkpoints and logs."})
    num_train_epochs: float = field(
        default=3.0, metadata={"help": "Passes over the data, where they are given and --max_steps is not."}
    )
    max_steps: int = field(default=150, metadata={"help": "Optimizer steps; not used where epochs are given."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples per process and step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Examples per process in evaluation."})
    learning_rate: float = field(
        default=2e-3,
        metadata={"help": "Peak learning rate; for a pretrained model 2e-5, or 2e-4 with LoRA, where none is given."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=20, metadata={"help": "Steps to the peak learning rate; below 1 a share of all steps."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled weight decay."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=50, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=75, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from; true takes the newest whole one of OUTPUT_DIR."}
    )
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
