"""What finetune.py makes of its flags, and what it says where they are wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from finetune_parts import words
from finetune_parts.command_line import GROUPS, LORA_RATE, PRETRAINED_RATE, Parser, parse
from finetune_parts.flags import ClipFlags
from transformers import TrainingArguments

from hf_gradclip.spec import strategy_names
from tests.scripts.test_finetune import script


def at(folder: Path) -> list[str]:
    return ["--output_dir", str(folder / "out"), "--disable_tqdm", "true"]


@pytest.fixture
def parsed(tmp_path):
    return lambda *flags: parse([*flags, "--output_dir", str(tmp_path)])


def test_epochs_count(parsed) -> None:
    """Without a word 150 steps; epochs alone are not overruled by that number; who gives both means the steps."""
    assert parsed()[2].max_steps == 150
    args = parsed("--num_train_epochs", "2")[2]
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)
    assert args.get_warmup_steps(50) == 5, "a tenth, since nobody knows how many steps two epochs are"
    assert parsed("--num_train_epochs", "2", "--warmup_steps", "7")[2].warmup_steps == 7
    assert parsed("--num_train_epochs", "2", "--max_steps", "9")[2].max_steps == 9


def test_epochs_of_a_run_file_count(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(f"num_train_epochs: 2\noutput_dir: {tmp_path}\n")
    assert parse([str(tmp_path / "run.yaml")])[2].max_steps == -1


def test_a_pretrained_model_has_a_smaller_rate(parsed, tmp_path) -> None:
    assert parsed()[2].learning_rate == 2e-3
    assert parsed("--lora_r", "8")[2].learning_rate == 2e-3, "a model from scratch, however it is trained"
    pretrained = ["--model_name_or_path", str(tmp_path)]
    assert parsed(*pretrained)[2].learning_rate == PRETRAINED_RATE < LORA_RATE < 2e-3
    assert parsed(*pretrained, "--lora_r", "8")[2].learning_rate == LORA_RATE
    assert parsed(*pretrained, "--lora_r", "8", "--learning_rate", "2e-3")[2].learning_rate == 2e-3, "what is typed"


@pytest.mark.parametrize(
    ("content", "flags", "record"),
    [
        (None, [], True),
        ("strategy: zclip\n", [], True),
        ("gradient: zclip\nrecord: false\n", [], False),
        ("gradient: zclip\nrecord: text\n", [], "text"),
        ("gradient: zclip\nrecord: false\n", ["--clip_record", "true"], True),
        (None, ["--clip_record", "false"], False),
    ],
)
def test_the_record_of_a_clip_file_counts(parsed, tmp_path, content, flags, record) -> None:
    if content is not None:
        (tmp_path / "clip.yaml").write_text(content)
        flags = [*flags, "--clip", str(tmp_path / "clip.yaml")]
    assert parsed(*flags)[0].clip_config().record == record


@pytest.mark.parametrize("content", ["gradient: [zclip\n", "- zclip\n"])
def test_a_clip_file_that_is_none_is_answered_in_one_line(tmp_path, capsys, content) -> None:
    (tmp_path / "clip.yaml").write_text(content)
    with pytest.raises(SystemExit) as left:
        script().command(["--clip", str(tmp_path / "clip.yaml"), *at(tmp_path)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "|" not in line]
    assert left.value.code == 2
    assert line.startswith("finetune.py: error: ")
    assert "clip.yaml" in line


def test_help_is_in_groups_with_ours_first_and_every_flag_once(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    found = capsys.readouterr().out
    places = [found.index(f"\n{title}:\n") for title in [*GROUPS, "all others of transformers.TrainingArguments"]]
    assert places == sorted(places)
    assert found.index("--clip ") < found.index("--train_file ") < found.index("--learning_rate ") < places[-1]
    assert found.index("--adam_beta1 ") > places[-1]
    flags = [line.split()[0].rstrip(",") for line in found.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags))
    every = [f for cls in (ClipFlags, TrainingArguments) for f in fields(cls) if f.init]
    assert {f"--{f.name}" for f in every} <= set(flags)


def wrong_calls(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Calls that cannot be served, with what must be said."""
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' * 30)
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    (tmp_path / "chat.jsonl").write_text((tmp_path / "chat.jsonl").read_text() * 2)
    (tmp_path / "picture.png").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    at = {path.name: str(path) for path in tmp_path.iterdir()}
    file = "--train_file"
    return {
        "strategy": (["--clip", "zclop"], "clip='zclop': no strategy or preset is called 'zclop'. Did you mean zclip?"),
        "colon": (["--clip", "zclip,z_threshold=3"], "After the name comes a colon: zclip:z_threshold=3."),
        "None": (["--clip", "None"], "'None' is text. To clip by max_grad_norm give no clip, in YAML `clip: null`"),
        "flag": (["--learnin_rate", "1e-3"], "--learnin_rate: no such flag. Did you mean --learning_rate?"),
        "word": (["zclip"], "zclip: no flag before it"),
        "number": (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        "choice": (["--optimizer", "momentm"], "argument --optimizer: invalid choice: 'momentm'"),
        "precisions": (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16 can be True"),
        "no file": ([file, "nowhere.jsonl"], "--train_file nowhere.jsonl: no such file or folder."),
        "ending": (
            [file, at["picture.png"]],
            "picture.png: must end in .txt, .md, .csv, .tsv, .json, .jsonl, .parquet",
        ),
        "folder": ([file, at["empty"]], "empty: no file in this folder ends in .txt,"),
        "JSON": ([file, at["broken.jsonl"]], "cannot be read as json: JSON parse error: Invalid value. in row 1"),
        "column": ([file, at["short.jsonl"], "--text_column", "body"], "--text_column body: the data has text."),
        "chat": (
            [file, at["chat.jsonl"], "--text_column", "messages"],
            "must hold text, and one row is <list>. Chats are",
        ),
        "short": ([file, at["short.jsonl"]], "--block_size 128: the train text has fewer tokens. Lower it."),
        "one row": ([file, at["one.jsonl"]], "the data has 1 row, of which none can be held out"),
        "no answer": ([file, at["chat.jsonl"]], "in none of the 1 chats of the train set is anything left to learn"),
        "model": (["--model_name_or_path", "/no/such"], "--model_name_or_path /no/such: no such folder."),
        "GGUF": (["--model_name_or_path", "no.gguf"], "--model_name_or_path no.gguf: no such file."),
        "not a model": (["--model_name_or_path", at["empty"]], f"--model_name_or_path {at['empty']}: "),
        "rank": (["--lora_r", "-1"], "--lora_r -1: must be >= 0; 0 trains all weights"),
        "bits": (["--load_in_4bit", "true"], "weights in 4 bits cannot be trained. Add --lora_r 8"),
        "dtype": (["--dtype", "bfloat16"], "--dtype bfloat16: needs --model_name_or_path"),
        "resume": (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no such folder"),
        "samples": (
            ["--max_eval_samples", "0"],
            "--max_eval_samples 0: must be >= 1, since a run ends with an evaluation",
        ),
        "run file": (["nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        "step": (["--max_steps", "0"], "--max_steps 0: must be > 0, or -1 with --num_train_epochs"),
    }


def test_a_wrong_call_is_answered_in_one_line(tmp_path, capsys) -> None:
    finetune = script()
    for name, (flags, said) in wrong_calls(tmp_path).items():
        with pytest.raises(SystemExit) as left:
            finetune.command([*flags, *at(tmp_path), "--max_text_bytes", "20000", "--vocab_size", "300"])
        lines = [line for line in capsys.readouterr().err.splitlines() if "|" not in line]
        assert left.value.code == 2, name
        assert len(lines) == 1, (name, lines)
        assert lines[0].startswith("finetune.py: error: "), (name, lines)
        assert said in lines[0], (name, lines)


def test_targets_that_no_layer_has(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        script().command(
            ["--lora_r", "2", "--lora_targets", "q_prj,v_proj", "--max_text_bytes", "20000", *at(tmp_path)]
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.endswith("--lora_targets q_prj,v_proj: no layer is called q_prj. Did you mean q_proj?")


@pytest.mark.parametrize(("package", "flags"), [("bitsandbytes", ["--load_in_4bit", "true"]), ("peft", [])])
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, package, flags) -> None:
    from finetune_parts import model

    monkeypatch.setattr(model, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(SystemExit):
        script().command(["--model_name_or_path", str(tmp_path), "--lora_r", "8", *flags, *at(tmp_path)])
    assert f"needs the package {package}, which is not installed: pip install" in capsys.readouterr().err


def test_rank_0_speaks_and_the_launcher_is_told(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    waited: list[float] = []
    monkeypatch.setattr(words.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            words.leave("no\n  such file")
        assert json.loads((tmp_path / "error.json").read_text())["message"].startswith(
            "finetune.py: error: no such file"
        )
    assert capsys.readouterr().err.splitlines()[0] == "finetune.py: error: no such file"
    assert waited == [words.SECONDS_FOR_RANK_0], "rank 1 lets rank 0 speak, whose end ends it"


def test_clip_list_prints_the_strategies(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        script().command(["--clip", "list"])
    assert left.value.code == 0
    found = capsys.readouterr().out
    assert all(name in found for name in strategy_names())


def test_every_flag_has_a_group_of_ours_or_is_the_trainers() -> None:
    ours = {name for names in GROUPS.values() for name in names}
    assert len(ours) == sum(map(len, GROUPS.values())), "a flag in two groups"
    every = {action.dest for action in Parser(None)._actions} - {"help"}
    assert ours <= every
    assert every - ours <= set(TrainingArguments.__dataclass_fields__)


def test_the_makers_chats_are_what_finetune_reads(tmp_path) -> None:
    from scripts.manual_chats import main

    main([str(tmp_path / "chats.jsonl")])
    rows = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) > 500
    assert all([m["role"] for m in row] == ["user", "assistant"] and row[1]["content"] for row in rows)
    answers = {row[0]["content"]: row[1]["content"] for row in rows}
    assert answers["What does str.upper do in Python?"] == str.upper.__doc__
