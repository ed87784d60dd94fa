"""A script of sentence-transformers on a tiny BERT that is made on the spot. Run in an environment of doors.py.

st_main.py OUT --way mixin --clip adaptive [--cross] [--sgd] [--resume CHECKPOINT]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "left", "right", "up", "down"]


def made(folder: Path, cross: bool) -> Path:
    """A tiny BERT and its tokenizer, in a folder."""
    vocabulary = folder / "vocab.txt"
    if not vocabulary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n", "utf-8")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=19, num_attention_heads=2, max_position_embeddings=32, num_labels=1, **sizes)
        (BertForSequenceClassification if cross else BertModel)(config).save_pretrained(folder)
        BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def pairs(cross: bool) -> Dataset:
    """Sentences of three words, and the same backwards; for a cross encoder with a label."""
    rows = [(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i : i + 3][::-1])) for i in range(len(WORDS) - 3)] * 3
    columns = {"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]}
    return Dataset.from_dict(columns | ({"label": [float(i % 2) for i in range(len(rows))]} if cross else {}))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--way", choices=["mixin", "patch", "stock"])
    parser.add_argument("--clip")
    parser.add_argument("--cross", action="store_true")
    parser.add_argument("--sgd", action="store_true")
    parser.add_argument("--resume")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    start = str(made(args.out.parent / "start", args.cross))
    model: Any = CrossEncoder(start, num_labels=1) if args.cross else SentenceTransformer(start)
    loss = BinaryCrossEntropyLoss(model) if args.cross else MultipleNegativesRankingLoss(model)
    settings: dict[str, Any] = {
        "output_dir": str(args.out),
        "max_steps": args.steps,
        "save_steps": args.steps // 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0 if args.sgd else 3e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd" if args.sgd else "adamw_torch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = (CrossEncoderTrainingArguments if args.cross else SentenceTransformerTrainingArguments)(**settings)
    cls: Any = CrossEncoderTrainer if args.cross else SentenceTransformerTrainer
    given = {"model": model, "args": arguments, "train_dataset": pairs(args.cross), "loss": loss}
    if args.way == "mixin":
        from hf_gradclip import GradClipMixin

        trainer = type("ClipTrainer", (GradClipMixin, cls), {})(**given, clip=args.clip)
    else:
        trainer = cls(**given)
    if args.way == "patch":
        import hf_gradclip

        hf_gradclip.patch(trainer, clip=args.clip)
    trainer.train(resume_from_checkpoint=args.resume)


if __name__ == "__main__":
    main()
