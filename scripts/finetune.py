"""Fine-tune a causal language model with clipping by strategy.

    accelerate launch scripts/finetune.py --clip adaptive
    accelerate launch scripts/finetune.py configs/runs/adagc.yaml --learning_rate 1e-3
    accelerate launch scripts/finetune.py --clip adaptive --model_name_or_path NAME --train_file chats.jsonl --lora_r 8
    python scripts/finetune.py --clip list

Without a model or data nothing is fetched: a small Llama is made from a config, a tokenizer is trained on the spot,
and the text is the source of Python's own standard library. Data are text, prompts with completions, or chats; of the
last two the loss counts only what is to be answered.

The loop is GradClipTrainer's, not the SFTTrainer's of TRL with our mixin: a plain install and a machine with nothing
but transformers can run it, and `TrainingArguments` keep their defaults, of which SFTConfig changes bf16 and gradient
checkpointing. Reading is left to `datasets`, templates to the tokenizer, adapters to peft, padding to transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, default_data_collator, set_seed

from hf_gradclip import GradClipTrainer, optim
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.view import UnsupportedBackendError

sys.path.append(str(Path(__file__).parent))  # where this file is imported from the root of the checkout

from finetune_parts.checkpoints import checkpoint_for, end_of_run, states_of
from finetune_parts.command_line import parse
from finetune_parts.examples import to_blocks
from finetune_parts.flags import RunArguments
from finetune_parts.model import END, load_model, load_tokenizer
from finetune_parts.samples import asked_for, beginning_of, tell_sample
from finetune_parts.texts import decided, kind_of, load_texts, no_bars, words_in
from finetune_parts.words import InputError, leave, tell

__all__ = ["END", "load_model", "load_texts", "load_tokenizer", "main", "parse", "to_blocks"]


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
    """Train, evaluate, save; the metrics of the run.

    Raises:
        InputError, SpecError, UnsupportedBackendError: for input that cannot be served, in one line.
        SystemExit: for wrong flags, --help, and --clip list.
    """
    clip_args, data_args, args = parse(
        sys.argv[1:] if argv is None else argv, (__doc__ or "").partition("\n\nThe loop")[0]
    )
    if clip_args.clip == "list":
        show_strategies()
    clip = clip_args.clip_config(args.max_grad_norm)
    if args.disable_tqdm:
        no_bars()
    set_seed(args.seed)
    with args.main_process_first(desc="loading the texts"):
        texts = load_texts(data_args, args.seed)
        kind = kind_of(texts["train"].column_names, data_args)
        data_args = decided(data_args, kind)
        scratch = data_args.model_name_or_path is None
        tokenizer = load_tokenizer(data_args, words_in(texts["train"], data_args) if scratch else [])
        data = to_blocks(texts, tokenizer, data_args)
    held_out = data["validation"].select(range(min(data_args.max_eval_samples, len(data["validation"]))))
    model = load_model(data_args, tokenizer)
    trainer = GradClipTrainer(
        model=model,
        args=args,
        clip=clip,
        train_dataset=data["train"],
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.packing else DataCollatorForSeq2Seq(tokenizer),
        optimizer_cls_and_kwargs=optimizer_of(args),
    )
    checkpoint = checkpoint_for(args.resume_from_checkpoint, args.output_dir, states_of(clip, model))
    if checkpoint and (ended := end_of_run(checkpoint, args.max_steps, args.num_train_epochs)):
        tell(ended)
        return saved_again(trainer, checkpoint)
    beginning = asked_for(data_args, tokenizer, kind) or beginning_of(held_out[0])
    if checkpoint is None:
        tell_sample("before training", trainer, beginning, data_args.sample_tokens)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = last_loss(trainer)
    metrics = {"eval_loss": after, **result.metrics}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == 0:
            metrics["eval_loss_before"] = entry["eval_loss"]
    if trainer.clipper is not None:
        metrics |= {f"clip/{key}": value for key, value in trainer.clipper.report.summary().items()}
    if trainer.update_clipper is not None:
        metrics |= {f"clip_update/{key}": value for key, value in trainer.update_clipper.report.summary().items()}
    if trainer.is_world_process_zero():
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    tell_sample("after training", trainer, beginning, data_args.sample_tokens)
    before = f"{metrics['eval_loss_before']:.3f} -> " if "eval_loss_before" in metrics else ""
    tell(f"eval loss {before}{after:.3f}; saved to {args.output_dir}")
    if clip is not None and clip.record:
        tell(f"what clipping did: hf-gradclip report {args.output_dir}")
    return metrics


def saved_again(trainer: GradClipTrainer, checkpoint: str) -> dict[str, float]:
    """What a run that was ended after its last checkpoint may not have come to: save the model, and evaluate it.

    FSDP and DeepSpeed load their checkpoints only as a training begins, so that nothing is done there.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        tell(f"The weights are in {checkpoint}.")
        return {}
    trainer._load_from_checkpoint(checkpoint)
    trainer.save_model()
    after = float(trainer.evaluate()["eval_loss"])
    tell(f"eval loss {after:.3f}; saved to {trainer.args.output_dir}")
    return {"eval_loss": after}


def last_loss(trainer: GradClipTrainer) -> float:
    """The evaluation loss of the model as it is at the end; evaluated now, unless that was done after the last step."""
    last = trainer.state.log_history[-3:] if not trainer.args.load_best_model_at_end else []
    found = [e["eval_loss"] for e in last if "eval_loss" in e and e["step"] == trainer.state.global_step]
    return float(found[-1] if found else trainer.evaluate()["eval_loss"])


def show_strategies() -> None:
    """Print what --clip takes, as `hf-gradclip list` does, and end."""
    from hf_gradclip.analysis.explain import listing

    tell(listing())
    raise SystemExit(0)


def command(argv: list[str] | None = None) -> None:
    """As `main`; where the input is wrong, one line on rank 0 and exit status 2."""
    try:
        main(argv)
    except (InputError, SpecError, UnsupportedBackendError) as error:
        leave(str(error))


if __name__ == "__main__":
    command()
