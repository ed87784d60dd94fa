"""ClipArguments in the parsers of transformers and trl."""

from __future__ import annotations

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from hf_gradclip import ClipArguments, ClipConfig
from hf_gradclip.record.options import RecordOptions
from hf_gradclip.strategy import SpecError


def parsed(*words: str) -> ClipArguments:
    (found,) = HfArgumentParser(ClipArguments).parse_args_into_dataclasses([*words])
    return found


def test_without_a_flag_it_is_max_grad_norm():
    assert parsed().clip_config(0.5) is None


@pytest.mark.parametrize("words", ["--clip_record true", "--clip_log rate", "--clip_nonfinite raise"])
def test_a_flag_that_would_do_nothing_is_an_error(words):
    with pytest.raises(SpecError, match=f"{words} without --clip"):
        parsed(*words.split()).clip_config(1.0)


def test_every_flag():
    words = (
        "--clip adagc:warmup_steps=3 --clip_nonfinite raise --clip_check_every 7 --clip_max_consecutive_skips 4 "
        "--clip_update block_rms:max_rms=2 --clip_fold false --clip_skip_sync true --clip_record text "
        "--clip_record_push true --clip_histogram_every 9 --clip_log rate,norm_mean --clip_console 1 "
        "--clip_after_spike stop:spikes=2"
    )
    assert parsed(*words.split()).clip_config() == ClipConfig.parse(
        {
            "gradient": "adagc:warmup_steps=3",
            "nonfinite": "raise",
            "check_every": 7,
            "max_consecutive_skips": 4,
            "update": "block_rms:max_rms=2",
            "record": {"text": True, "push": True},
            "histogram_every": 9,
            "after_spike": "stop:spikes=2",
            "log": ["rate", "norm_mean"],
            "console": 1,
        }
    )


def test_there_is_a_flag_for_each_part():
    parts = {"gradient": "clip"} | {f.name: f"clip_{f.name}" for f in fields(ClipConfig) if f.name != "gradient"}
    assert {*parts.values()} | {"clip_record_push"} == {f.name for f in fields(ClipArguments)}


def test_what_is_left_out_is_left_to_the_file(tmp_path):
    path = tmp_path / "clip.yaml"
    path.write_text("gradient: zclip\nrecord: {text: true, push: true}\nlog: [rate]\nfold: true\nskip_sync: false\n")
    assert parsed("--clip", str(path)).clip_config() == ClipConfig.parse(str(path))
    assert parsed("--clip", str(path), "--clip_record", "false").clip_config().record is False


@pytest.mark.parametrize(
    ("words", "record"),
    [
        ("--clip_record true", True),
        ("--clip_record text", "text"),
        ("--clip_record false --clip_record_push true", False),
        ("--clip_record text --clip_record_push false", "text"),
        ("--clip_record_push true", RecordOptions(push=True)),
    ],
)
def test_the_record(words, record):
    assert parsed("--clip", "zclip", *words.split()).clip_config().record == record


def test_an_update_alone_goes_with_max_grad_norm():
    config = parsed("--clip_update", "block_rms:max_rms=1").clip_config(0.5)
    assert config == ClipConfig.parse(None, max_grad_norm=0.5, update="block_rms:max_rms=1")


def test_a_file_of_trl(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nmax_grad_norm: 0.25\nclip_record: true\nclip_log: [rate]\n"
        "clip: {gradient: adagc, update: 'block_rms:max_rms=1'}\n"
    )
    parser = TrlParser((ClipArguments, TrainingArguments))
    clip, args = parser.parse_args_and_config(["--config", str(path), "--clip_nonfinite", "raise"])
    assert args.max_grad_norm == 0.25
    assert clip.clip_config(args.max_grad_norm) == ClipConfig.parse(
        {"gradient": "adagc", "update": "block_rms:max_rms=1", "nonfinite": "raise", "record": True, "log": "rate"}
    )


def test_a_wrong_one_is_an_error_in_words():
    with pytest.raises(SpecError, match="Did you mean zclip"):
        parsed("--clip", "zclop").clip_config()
    with pytest.raises(SystemExit):
        parsed("--clip", "zclip", "--clip_record", "yes")
