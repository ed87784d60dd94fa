"""Flags that say how to clip, for a script that reads its arguments into dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hf_gradclip.config import ClipConfig
from hf_gradclip.strategy import SpecError

_RECORD = {"true": True, "false": False}


@dataclass
class ClipArguments:
    """How to clip, for transformers' HfArgumentParser and trl's TrlParser.

        parser = HfArgumentParser((ClipArguments, TrainingArguments))
        clip_args, args = parser.parse_args_into_dataclasses()
        trainer = GradClipTrainer(..., args=args, clip=clip_args.clip_config(args.max_grad_norm))

    A field that is left out says nothing, so that the spec in `clip`, or in the file that it names, decides. In a YAML
    file of TrlParser `clip` may also be a whole configuration.
    """

    clip: str | None = field(
        default=None, metadata={"help": "Strategy, preset or YAML file; 'none' measures only; else max_grad_norm."}
    )
    clip_nonfinite: str | None = field(default=None, metadata={"help": "At a NaN or inf norm: skip, raise or pass."})
    clip_check_every: int | None = field(
        default=None, metadata={"help": "Steps between two checks that replicas agree; 0 never checks."}
    )
    clip_max_consecutive_skips: int | None = field(
        default=None, metadata={"help": "Skipped steps in a row after which training stops."}
    )
    clip_update: str | None = field(
        default=None, metadata={"help": "Strategy for what the optimizer makes of the gradients: block_rms, say."}
    )
    clip_fold: bool | None = field(
        default=None, metadata={"help": "Hand the coefficient to torch's fused optimizer instead of writing gradients."}
    )
    clip_skip_sync: bool | None = field(
        default=None, metadata={"help": "False reads no flag per step, and schedulers do not wait for a skipped one."}
    )
    clip_record: str | None = field(
        default=None,
        metadata={
            "help": "Keep every step's norms and scales in OUTPUT_DIR/gradclip; text adds the examples of a spike.",
            "choices": ["true", "false", "text"],
        },
    )
    clip_record_push: bool | None = field(
        default=None, metadata={"help": "Let the Trainer upload that record with the model."}
    )
    clip_histogram_every: int | None = field(
        default=None, metadata={"help": "Steps between two histograms of the norms by parameter, for TensorBoard, ..."}
    )
    clip_after_spike: str | None = field(
        default=None, metadata={"help": "What is done by itself after a spike: lower_rate:factor=0.1,steps=50, stop."}
    )
    clip_log: str | None = field(
        default=None, metadata={"help": "What is logged of clipping: all, none, or words such as norm_mean,rate."}
    )
    clip_console: int | None = field(default=None, metadata={"help": "How many of these the Trainer prints."})

    def clip_config(self, max_grad_norm: float | None = None) -> ClipConfig | None:
        """What GradClipTrainer takes as `clip`.

        Args:
            max_grad_norm: of TrainingArguments: the limit on the gradient where only the update has a strategy.

        Returns:
            The configuration; None where neither `clip` nor `clip_update` is given, which means `max_grad_norm`.

        Raises:
            SpecError: for a wrong one, and for another flag where neither of these two is given.
        """
        if self.clip is None and self.clip_update is None:
            changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            if changed:
                raise SpecError(
                    f"--{changed[0]} {getattr(self, changed[0])} without --clip: it would do nothing. Add --clip "
                    "adaptive, or --clip none to measure only."
                )
            return None
        return ClipConfig.parse(
            self.clip,
            max_grad_norm=max_grad_norm,
            nonfinite=self.clip_nonfinite,
            max_consecutive_skips=self.clip_max_consecutive_skips,
            check_every=self.clip_check_every,
            update=self.clip_update,
            fold=self.clip_fold,
            skip_sync=self.clip_skip_sync,
            record=self._record(),
            histogram_every=self.clip_histogram_every,
            after_spike=self.clip_after_spike,
            log=self.clip_log,
            console=self.clip_console,
        )

    def _record(self) -> Any:
        """What is said of the record; None leaves it to the spec."""
        record: Any = self.clip_record  # a parser of YAML makes a bool of it
        record = _RECORD.get(record, record)
        if self.clip_record_push is None or record is False:
            return record
        return {"text": record == "text", "push": self.clip_record_push}
