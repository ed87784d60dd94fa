"""The command line: a run file and flags, what follows where a flag is left out, and help in groups."""

from __future__ import annotations

import itertools
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from finetune_parts.flags import ClipFlags, DataArguments, RunArguments
from finetune_parts.words import first_line, leave
from hf_gradclip import yaml_file
from hf_gradclip.spec import nearest

Arguments = tuple[ClipFlags, DataArguments, RunArguments]

PRETRAINED_RATE, LORA_RATE = 2e-5, 2e-4
WARMUP_SHARE = 0.1

GROUPS = {
    "clipping": [f.name for f in fields(ClipFlags)],
    "model": ["model_name_or_path", "dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "load_in_4bit"],
    "data": [
        *("train_file", "validation_file", "dataset_name", "dataset_config_name"),
        *("text_column", "prompt_column", "completion_column", "messages_column"),
        *("validation_share", "block_size", "packing", "vocab_size", "max_text_bytes", "max_eval_samples"),
        *("sample_tokens", "sample_prompt"),
    ],
    "training": [
        *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optimizer", "bf16", "fp16", "seed"),
        *("logging_steps", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size"),
        *("save_steps", "save_total_limit", "resume_from_checkpoint", "report_to"),
    ],
}
"""Flags by what they are about, ours first; all that are named nowhere here are the Trainer's."""
THE_TRAINERS = "all others of transformers.TrainingArguments"


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Each flag once, without its twin in dashes, and no default where there is none."""

    def _format_action_invocation(self, action: Any) -> str:
        shown = [word for word in action.option_strings if "-" not in word[2:]] or action.option_strings
        word = f" {self._format_args(action, action.dest.upper())}" if action.nargs != 0 and not action.choices else ""
        word = f" {{{','.join(map(str, action.choices))}}}" if action.choices and len(action.choices) < 8 else word
        return ", ".join(shown) + word

    def _get_help_string(self, action: Any) -> str:
        text = " ".join((action.help or "").split()).replace("%(", "%%(") if action.dest != "help" else action.help
        return text if action.default in (None, SUPPRESS, "") else f"{text} (default: %(default)s)"


class Parser(HfArgumentParser):
    """Flags of the three dataclasses. An error is one line on rank 0."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            (ClipFlags, DataArguments, RunArguments),
            prog="finetune.py",
            usage="finetune.py [RUN.yaml] [--flag value ...]",
            description=description,
            formatter_class=_Help,
        )
        self._put_into_groups()

    def error(self, message: str) -> NoReturn:
        """Leave with one line."""
        leave(f"{message}{'' if message.endswith(('.', '?')) else '.'} --help lists the flags.")

    def _put_into_groups(self) -> None:
        """Move each flag out of the one long list into its group."""
        (every,) = (group for group in self._action_groups if len(group._group_actions) > 1)
        group_of = {name: title for title, names in GROUPS.items() for name in names}
        groups = {title: self.add_argument_group(title) for title in [*GROUPS, THE_TRAINERS]}
        for action in [a for a in every._group_actions if a.dest != "help"]:
            every._group_actions.remove(action)
            groups[group_of.get(action.dest, THE_TRAINERS)]._group_actions.append(action)
        for title, names in GROUPS.items():
            groups[title]._group_actions.sort(key=lambda action, names=names: names.index(action.dest))

    def dest_given(self, argv: list[str]) -> set[str]:
        """The flags that stand in the words, whatever their values.

        Raises:
            SystemExit: for a word that is no flag, and for a value that is none of its flag.
        """
        nothing = object()
        found, unknown = self.parse_known_args(argv, Namespace(**{action.dest: nothing for action in self._actions}))
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.endswith((".yaml", ".yml")):
                self.error(f"{word}: a file of arguments comes first, before all flags")
            known = [option for action in self._actions for option in action.option_strings if option[:2] == "--"]
            self.error(
                f"{word}: " + (f"no such flag.{nearest(word, known)}" if word[:1] == "-" else "no flag before it")
            )
        return {dest for dest, value in vars(found).items() if value is not nothing}


def parse(argv: list[str], description: str | None = None) -> Arguments:
    """Read the command line; a first argument that ends in .yaml gives defaults which later flags win over.

    Raises:
        SystemExit: for wrong flags, after one line on rank 0; for --help.
    """
    parser = Parser(description)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _from_file(parser, Path(argv[0])) + argv[1:]
    for before, word in itertools.pairwise(argv):
        if word.endswith((".yaml", ".yml")) and not before.startswith("--") and not word.startswith("-"):
            parser.error(f"{word}: a file of arguments comes first, before all flags")
    given = parser.dest_given(argv)
    parser.set_defaults(**dict(_implied(parser, argv, given)))
    try:
        clip_args, data_args, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError, OSError) as error:
        parser.error(first_line(error))
    for wrong in _contradictions(data_args, args):
        parser.error(wrong)
    return clip_args, data_args, args


def _implied(parser: Parser, argv: list[str], given: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What flags that are left out become, because of those that are there."""
    found = parser.parse_args(argv)
    if "num_train_epochs" in given and "max_steps" not in given:
        yield "max_steps", -1
        if "warmup_steps" not in given:
            yield "warmup_steps", WARMUP_SHARE
    if "learning_rate" not in given and found.model_name_or_path is not None:
        yield "learning_rate", LORA_RATE if found.lora_r else PRETRAINED_RATE


def _contradictions(data: DataArguments, args: TrainingArguments) -> Iterator[str]:
    """Values that cannot be served, or not together."""
    if data.lora_r < 0:
        yield f"--lora_r {data.lora_r}: must be >= 0; 0 trains all weights"
    if not 0 <= data.lora_dropout < 1:
        yield f"--lora_dropout {data.lora_dropout}: must be in [0, 1)"
    if data.load_in_4bit and not data.lora_r:
        yield "--load_in_4bit true: weights in 4 bits cannot be trained. Add --lora_r 8"
    if data.load_in_4bit and not data.model_name_or_path:
        yield "--load_in_4bit true: needs --model_name_or_path"
    if data.dtype and not data.model_name_or_path:
        yield f"--dtype {data.dtype}: needs --model_name_or_path. --bf16 true computes in bfloat16"
    if not 0 < data.validation_share < 1:
        yield f"--validation_share {data.validation_share}: must be between 0 and 1"
    if data.max_eval_samples < 1:
        yield f"--max_eval_samples {data.max_eval_samples}: must be >= 1, since a run ends with an evaluation"
    if data.block_size is not None and data.block_size < 2:
        yield f"--block_size {data.block_size}: must be >= 2 tokens"
    if data.train_file and data.dataset_name:
        yield "--train_file and --dataset_name: give one of them"
    if data.validation_file and not data.train_file:
        yield "--validation_file: needs --train_file"
    if data.sample_tokens < 0:
        yield f"--sample_tokens {data.sample_tokens}: must be >= 0"
    asked = args.resume_from_checkpoint
    if asked and asked.lower() not in ("true", "false") and not Path(asked).is_dir():
        yield f"--resume_from_checkpoint {asked}: no such folder; true takes the newest whole one of --output_dir"
    if args.max_steps == 0 or args.max_steps < -1:
        yield f"--max_steps {args.max_steps}: must be > 0, or -1 with --num_train_epochs"


def _from_file(parser: Parser, path: Path) -> list[str]:
    """The words of a run file. None has a meaning for the flags of clipping; elsewhere it means the default."""
    try:
        values = yaml_file.load(path.read_text("utf-8")) or {}
    except OSError as error:
        parser.error(f"{path}: {error.strerror or error}")
    except (ValueError, yaml.YAMLError) as error:
        parser.error(f"{path}: is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{path}: must hold lines of key: value, the flags without their dashes")
    known = {action.dest for action in parser._actions}
    unknown = [key for key in values if key not in known]
    if unknown:
        parser.error(f"{path}: unknown keys {', '.join(map(str, unknown))}.{nearest(unknown[0], known)}")
    deep = [key for key, value in values.items() if isinstance(value, dict | list)]
    if deep:
        parser.error(f"{path}: {deep[0]} must be one value. Put it into a file of its own: {deep[0]}: its.yaml")
    of_clip = {f.name for f in fields(ClipFlags)}
    parser.set_defaults(**{key: None for key, value in values.items() if value is None and key in of_clip})
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]
