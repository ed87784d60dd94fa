"""Which values are logged: what may be written, and what is picked."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from hf_gradclip import ClipConfig, Clipper
from hf_gradclip.logged import WORDS, is_ours, pick
from hf_gradclip.spec import preset_names, strategy_class, strategy_names
from hf_gradclip.strategy import SpecError, describe
from tests.tiny import tiny_llama


def test_the_words_are_those_of_the_reference():
    """Every key that the docs name can be chosen, and no other."""
    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text("utf-8")
    assert tuple(re.findall(r"^\| `clip/(\w+)` \|", page, re.MULTILINE)) == WORDS


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("all", WORDS),
        ("none", ()),
        ([], ()),
        ("rate", ("rate",)),
        ("rate, norm_mean", ("rate", "norm_mean")),
        (["rate", "norm_mean"], ("rate", "norm_mean")),
    ],
)
def test_what_may_be_written(log, words):
    config = ClipConfig.parse({"gradient": "zclip", "log": log})
    assert config.log == words
    assert ClipConfig.parse("zclip", log=log) == config


@pytest.mark.parametrize("log", ["rates", "rate,rate", "", 3, None, ["rate", 3], [["rate"]], {"rate": 1}, True])
def test_what_may_not(log):
    with pytest.raises(SpecError, match=r"ClipConfig\(log=.*must be all, none, or each once of norm_mean, norm_max"):
        ClipConfig.parse({"gradient": "zclip", "log": log})


@pytest.mark.parametrize("console", [-1, 1.0, "3", True])
def test_how_many_are_printed_is_a_number(console):
    with pytest.raises(SpecError, match=r"console=.*must be a whole number >= 0\. None prints all"):
        ClipConfig.parse({"gradient": "zclip", "console": console})


def test_they_are_picked_in_their_order():
    scalars = {"loss": 1.0, "clip/rate": 2.0, "clip/norm_mean": 3.0, "clip_update/rate": 4.0, "mine/rate": 5.0}
    assert [*pick(scalars, ("norm_mean", "rate")).items()] == [
        ("loss", 1.0),
        ("mine/rate", 5.0),
        ("clip/norm_mean", 3.0),
        ("clip/rate", 2.0),
        ("clip_update/rate", 4.0),
    ]
    assert pick(scalars, ()) == {"loss": 1.0, "mine/rate": 5.0}


@pytest.mark.parametrize(
    ("key", "ours"),
    [("clip/rate", True), ("clip_Generator_2/rate", True), ("rate", False), ("clip/mine", False), ("grad_norm", False)],
)
def test_whose_a_key_is(key, ours):
    assert is_ours(key) == ours


@pytest.mark.parametrize("word", ["log", "console"])
def test_a_plain_loop_logs_what_it_wants(word):
    with pytest.raises(SpecError, match=rf"for_model\(\.\.\., {word}=.*log `clipper\.report\.scalars\(\)`"):
        Clipper.for_model(tiny_llama(), {"gradient": "zclip", word: {"log": "rate", "console": 0}[word]})


def wanted(cls: type) -> dict[str, float]:
    """A value for each field that has none."""
    return {f.name: 1 / 3 for f in fields(cls) if f.default is MISSING}


def specs() -> list[object]:
    whole = {
        "gradient": "adagc:lambda_rel=1.0000000000000002+value:max_value=1e-30",
        "update": "param_norm:max_norm=inf",
        "nonfinite": "raise",
        "max_consecutive_skips": 3,
        "check_every": 0,
        "record": "text",
        "histogram_every": 7,
        "after_spike": f"lower_rate:factor={0.1 + 0.2},steps=1234567+stop:spikes=3,steps=100",
        "log": "rate",
        "console": 1,
    }
    own = [describe(strategy_class(name)(**wanted(strategy_class(name)))) for name in strategy_names()]
    groups = {"*head*": 0.1 + 0.2, "*": "adaptive"}
    return [whole, groups, 0.1 + 0.2, "global_norm:max_norm=1e22,norm_type=inf", *own, *preset_names()]


@pytest.mark.parametrize("spec", specs(), ids=str)
def test_a_configuration_in_plain_values_is_read_back(spec):
    """To the last bit of every number, and through JSON."""
    config = ClipConfig.parse(spec)
    assert ClipConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
