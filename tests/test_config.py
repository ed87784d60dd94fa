"""The spec grammar: every form that is accepted, every wrong input with its words, a fuzz that finds no third way."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_gradclip import ClipConfig
from hf_gradclip.grouped import SETTINGS
from hf_gradclip.spec import preset_names, strategy_names
from hf_gradclip.strategies.adagc import AdaGC
from hf_gradclip.strategies.adaptive_norm import AdaptiveNorm
from hf_gradclip.strategies.adaptive_tensors import AdaptiveTensors
from hf_gradclip.strategies.agc import AGC
from hf_gradclip.strategies.autoclip import AutoClip
from hf_gradclip.strategies.global_norm import GlobalNorm
from hf_gradclip.strategies.none import NoClip
from hf_gradclip.strategies.param_norm import ParamNorm
from hf_gradclip.strategies.skip_step import SkipStep
from hf_gradclip.strategies.value import Value
from hf_gradclip.strategies.zclip import ZClip
from hf_gradclip.strategy import Chain, SpecError

PAPER_ZCLIP = ZClip(mode="reference", max_norm=1.0)
PAPER_ADAGC = AdaGC(mode="reference", max_norm=1.0)

USER_MODULE = """
from dataclasses import dataclass
from hf_gradclip import Strategy
from hf_gradclip.strategy import Needs, Stateless
from hf_gradclip.types import ClipPlan


@dataclass(frozen=True)
class Halve(Strategy):
    factor: float = 0.5
    needs = Needs()

    def init(self, layout):
        return Stateless()

    def update(self, stats, state):
        return ClipPlan(stats.sumsq_S.new_full((), self.factor)), state


class NoDataclass(Strategy):
    needs = Needs()

    def init(self, layout):
        return Stateless()

    def update(self, stats, state):
        return ClipPlan(stats.sumsq_S.new_ones(())), state


@dataclass(frozen=True)
class Abstract(Strategy):
    factor: float = 0.5


number = 3
"""


def gradient(spec, **settings):
    return ClipConfig.parse(spec, **settings).gradient


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module `my_clips` with strategies of a user."""
    (tmp_path / "my_clips.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_clips", None)


class TestForms:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("none", NoClip()),
            (2, GlobalNorm(max_norm=2.0)),
            (0.5, GlobalNorm(max_norm=0.5)),
            (math.inf, GlobalNorm(max_norm=math.inf)),
            ("0.5", GlobalNorm(max_norm=0.5)),
            (" 2 ", GlobalNorm(max_norm=2.0)),
            ("1e-3", GlobalNorm(max_norm=1e-3)),
            ("1e+3", GlobalNorm(max_norm=1e3)),
            ("inf", GlobalNorm(max_norm=math.inf)),
            ("global_norm", GlobalNorm()),
            ("global_norm:max_norm=1.0", GlobalNorm(max_norm=1.0)),
            ("global_norm:max_norm=3,norm_type=inf", GlobalNorm(max_norm=3.0, norm_type=math.inf)),
            ("global_norm:max_norm=1e+2", GlobalNorm(max_norm=100.0)),
            (" global_norm : max_norm = 3 , norm_type = 2 ", GlobalNorm(max_norm=3.0)),
            ("value:max_value=1", Value(max_value=1.0)),
            ("param_norm:max_norm=1", ParamNorm(max_norm=1.0)),
            ("zclip", ZClip()),
            ("zclip:z_threshold=3,mode=reference", ZClip(z_threshold=3.0, mode="reference")),
            ("zclip:max_norm=inf", ZClip(max_norm=math.inf)),
            ("adagc:warmup_steps=10", AdaGC(warmup_steps=10)),
            ("autoclip:percentile=50,window=7", AutoClip(percentile=50.0, window=7)),
            ("adagc+value:max_value=1", Chain((AdaGC(), Value(max_value=1.0)))),
            ("adagc + value:max_value=1", Chain((AdaGC(), Value(max_value=1.0)))),
            ("global_norm:max_norm=1e+2+zclip", Chain((GlobalNorm(max_norm=100.0), ZClip()))),
            ("none+zclip+adagc+value:max_value=2", Chain((NoClip(), ZClip(), AdaGC(), Value(max_value=2.0)))),
            ("adaptive_norm", AdaptiveNorm()),
            ("adaptive_tensors", AdaptiveTensors()),
            ("adaptive", Chain((AdaptiveNorm(), AGC(include_adapters=False)))),
            ("skip_step+adaptive", Chain((SkipStep(), AdaptiveNorm(), AGC(include_adapters=False)))),
            ("adaptive_norm+agc:clip_factor=0.02", Chain((AdaptiveNorm(), AGC(clip_factor=0.02)))),
            ("zclip_paper", PAPER_ZCLIP),
            ("zclip_paper:mode=safe,alpha=0.9", ZClip(alpha=0.9, max_norm=1.0)),
            ("adagc_paper", PAPER_ADAGC),
            ("autoclip_paper", AutoClip(percentile=10.0, window=10_000)),
            ("adagc_paper+zclip_paper", Chain((PAPER_ADAGC, PAPER_ZCLIP))),
            ({"strategy": "zclip"}, ZClip()),
            ({"strategy": "zclip", "z_threshold": 3, "mode": "reference"}, ZClip(z_threshold=3.0, mode="reference")),
            ({"strategy": "adaptive"}, Chain((AdaptiveNorm(), AGC(include_adapters=False)))),
            ({"gradient": "adaptive"}, Chain((AdaptiveNorm(), AGC(include_adapters=False)))),
            ({"strategy": "zclip_paper", "alpha": 0.5}, replace(PAPER_ZCLIP, alpha=0.5)),
            ({"gradient": "zclip"}, ZClip()),
            ({"gradient": 2}, GlobalNorm(max_norm=2.0)),
            ({"gradient": "none"}, NoClip()),
            ({"gradient": {"strategy": "value", "max_value": 2}}, Value(max_value=2.0)),
            (ZClip(alpha=0.5), ZClip(alpha=0.5)),
            (ClipConfig(gradient=ZClip(alpha=0.5)), ZClip(alpha=0.5)),
        ],
        ids=repr,
    )
    def test_gradient(self, spec, expected):
        assert gradient(spec) == expected

    def test_a_whole_number_where_a_float_is_asked_for_becomes_one(self):
        assert type(gradient("global_norm:max_norm=3").max_norm) is float
        assert type(gradient({"strategy": "zclip", "alpha": 0}).alpha) is float

    @pytest.mark.parametrize(
        ("max_grad_norm", "expected"), [(1.0, GlobalNorm(1.0)), (3, GlobalNorm(3.0)), (0, NoClip()), (0.0, NoClip())]
    )
    def test_none_is_what_max_grad_norm_says_and_passes_non_finite_norms_on(self, max_grad_norm, expected):
        config = ClipConfig.parse(None, max_grad_norm=max_grad_norm)
        assert config.gradient == expected
        assert config.nonfinite == "pass"

    @pytest.mark.parametrize("spec", ["zclip", 2.0, {"strategy": "zclip"}, {"gradient": "zclip"}, "none"])
    def test_a_spec_wins_over_max_grad_norm(self, spec):
        assert ClipConfig.parse(spec, max_grad_norm=7.0) == ClipConfig.parse(spec)
        assert ClipConfig.parse(spec).nonfinite == "skip"
        assert ClipConfig.parse(spec).max_consecutive_skips == 20

    def test_a_whole_configuration(self):
        given_ = {"gradient": "adagc", "nonfinite": "raise", "max_consecutive_skips": 3}
        assert ClipConfig.parse(given_) == ClipConfig(AdaGC(), "raise", 3)
        assert given_ == {"gradient": "adagc", "nonfinite": "raise", "max_consecutive_skips": 3}

    def test_the_settings_are_the_fields_of_the_configuration(self):
        assert {*SETTINGS} == {field.name for field in fields(ClipConfig)}

    def test_a_setting_beside_patterns_in_a_file_of_groups(self, tmp_path):
        path = tmp_path / "groups.yaml"
        path.write_text("'*': agc\nmax_consecutive_skips: 5\n")
        for spec in (str(path), {"gradient": str(path)}):
            with pytest.raises(SpecError, match="'max_consecutive_skips' beside patterns"):
                ClipConfig.parse(spec)

    def test_a_wrong_keyword_is_not_laid_to_the_file(self, tmp_path):
        path = tmp_path / "clip.yaml"
        path.write_text("gradient: zclip\n")
        with pytest.raises(SpecError, match=r"^ClipConfig\(nonfinite='Skip'\)"):
            ClipConfig.parse(str(path), nonfinite="Skip")
        for spec in (str(path), "zclip", ClipConfig(ZClip())):
            with pytest.raises(SpecError, match=r"^update=\[\]: a list is no spec"):
                ClipConfig.parse(spec, update=[])

    def test_whole_numbers_of_numpy(self):
        given_ = {"gradient": "adagc", "max_consecutive_skips": np.int64(3), "check_every": np.int32(7)}
        config = ClipConfig.parse(given_)
        assert config == ClipConfig(AdaGC(), "skip", 3, 7)
        assert type(config.max_consecutive_skips) is int

    def test_a_parameter_that_has_the_name_of_a_setting(self):
        config = ClipConfig.parse({"groups": {"record": 1.0, "*": "none"}})
        assert [group.pattern for group in config.gradient.groups] == ["record", "*"]
        assert not config.record

    def test_settings_win_over_the_spec(self):
        given_ = {"gradient": "adagc", "nonfinite": "raise", "max_consecutive_skips": 3}
        assert ClipConfig.parse(given_, nonfinite="pass", max_consecutive_skips=4) == ClipConfig(AdaGC(), "pass", 4)
        assert ClipConfig.parse(None, max_grad_norm=1, nonfinite="skip").nonfinite == "skip"
        assert ClipConfig.parse(ClipConfig(AdaGC(), "raise", 3), nonfinite="pass") == ClipConfig(AdaGC(), "pass", 3)

    @pytest.mark.parametrize(
        ("preset", "numbers"),
        [
            ("zclip_paper", {"z_threshold": 2.5, "alpha": 0.97, "warmup_steps": 25, "max_norm": 1.0}),
            ("adagc_paper", {"lambda_rel": 1.04, "beta": 0.99, "warmup_steps": 100, "max_norm": 1.0}),
            ("autoclip_paper", {"percentile": 10.0}),
        ],
    )
    def test_a_papers_preset_has_the_authors_numbers(self, preset, numbers):
        """ZClip: arXiv 2504.02507; AdaGC: 2502.11034; AutoClip: 2007.14469."""
        fields = asdict(gradient(preset))
        assert {key: fields[key] for key in numbers} == numbers
        assert fields.get("mode", "reference") == "reference"

    def test_nothing_adaptive_has_a_fixed_limit_by_default(self):
        assert ZClip().max_norm == AdaGC().max_norm == math.inf

    def test_every_strategy_and_preset_has_a_name(self):
        required = {"value": "value:max_value=1", "param_norm": "param_norm:max_norm=1"}
        required["relative_value"] = "relative_value:factor=50"
        for name in strategy_names() + preset_names():
            gradient(required.get(name, name))


class TestYaml:
    @pytest.mark.parametrize(
        "text", ["gradient: zclip\nnonfinite: raise\ngradient: none\n", "strategy: zclip\nstrategy: agc\n"]
    )
    def test_a_key_that_is_given_twice(self, text, tmp_path) -> None:
        (tmp_path / "clip.yaml").write_text(text)
        with pytest.raises(SpecError, match="is given twice"):
            ClipConfig.parse(str(tmp_path / "clip.yaml"))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("strategy: zclip\nalpha: 0.5\n", ClipConfig(ZClip(alpha=0.5))),
            ("zclip:alpha=0.5\n", ClipConfig(ZClip(alpha=0.5))),
            ("2.0\n", ClipConfig(GlobalNorm(2.0))),
            ("adagc+value:max_value=1\n", ClipConfig(Chain((AdaGC(), Value(1.0))))),
            ("gradient: none\nnonfinite: raise\n", ClipConfig(NoClip(), "raise")),
            (
                "gradient:\n  strategy: adagc\n  beta: 0.5\nmax_consecutive_skips: 4\n",
                ClipConfig(AdaGC(beta=0.5), "skip", 4),
            ),
            ("strategy: global_norm\nmax_norm: .inf\n", ClipConfig(GlobalNorm(math.inf))),
            ("strategy: global_norm\nmax_norm: inf\n", ClipConfig(GlobalNorm(math.inf))),
            ("strategy: global_norm\nmax_norm: 1e-3\n", ClipConfig(GlobalNorm(1e-3))),
        ],
        ids=lambda value: repr(value) if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("suffix", ["yaml", "yml"])
    def test_file(self, tmp_path, text, expected, suffix):
        """Also numbers that YAML takes for words: 1e-3 and inf mean in a file what they mean in a string."""
        path = tmp_path / f"clip.{suffix}"
        path.write_text(text)
        assert ClipConfig.parse(str(path)) == expected

    def test_keys_win_over_the_file(self, tmp_path):
        path = tmp_path / "clip.yaml"
        path.write_text("strategy: zclip\nalpha: 0.5\nz_threshold: 3\n")
        assert gradient(f"{path}:alpha=0.9") == ZClip(alpha=0.9, z_threshold=3.0)
        assert gradient({"strategy": str(path), "alpha": 0.9}) == ZClip(alpha=0.9, z_threshold=3.0)

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("clip.yaml+none", Chain((AdaGC(), ZClip(), NoClip()))),
            ("none+clip.yaml", Chain((NoClip(), AdaGC(), ZClip()))),
            ("clip.yaml+clip.yaml", Chain((AdaGC(), ZClip(), AdaGC(), ZClip()))),
            ({"gradient": "none+clip.yaml"}, Chain((NoClip(), AdaGC(), ZClip()))),
        ],
    )
    def test_in_a_chain(self, tmp_path, monkeypatch, spec, expected):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "clip.yaml").write_text("adagc+zclip\n")
        assert gradient(spec) == expected

    @pytest.mark.parametrize(
        ("text", "spec", "words"),
        [
            ("[1, 2]", "clip.yaml", "holds [1, 2], which is no spec"),
            ("true", "clip.yaml", "holds True, which is no spec"),
            ("", "clip.yaml", "holds None, which is no spec"),
            ("a: [", "clip.yaml", "is not YAML"),
            ("strategy: zclip\nalfa: 1\n", "clip.yaml", "zclip has no field 'alfa'. Did you mean alpha?"),
            (
                "gradient: zclip\nnonfinite: Skip\n",
                "clip.yaml",
                "clip='clip.yaml': ClipConfig(nonfinite='Skip'): must be",
            ),
            ("gradent: zclip\n", "clip.yaml", "unknown key 'gradent'. Did you mean gradient?"),
            ("adagc+zclip", "clip.yaml:alpha=1", "is adagc+zclip, so it takes no keys, and alpha came with it"),
            ("gradient: zclip", "clip.yaml+zclip", "holds a whole configuration and cannot be a part of another spec"),
            ("gradient: zclip", "zclip+clip.yaml", "holds a whole configuration and cannot be a part of another spec"),
            ("gradient: zclip", "clip.yaml:alpha=1", "so it takes no keys"),
            ("gradient: clip.yaml", "clip.yaml", "holds a whole configuration"),
            ("other.yaml", "clip.yaml", "points to another file"),
            ("strategy: clip.yaml", "clip.yaml", "clip.yaml"),
            ("clip.yaml+none", "clip.yaml", "clip.yaml"),
            ("none+clip.yaml", "clip.yaml", "clip.yaml"),
        ],
    )
    def test_wrong(self, tmp_path, monkeypatch, text, spec, words):
        """The last three point to themselves."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "clip.yaml").write_text(text)
        with pytest.raises(SpecError, match=re.escape(words)):
            ClipConfig.parse(spec)

    def test_not_text(self, tmp_path):
        path = tmp_path / "clip.yaml"
        path.write_bytes(b"\xff\xfe\x00zclip")
        with pytest.raises(SpecError, match="cannot read"):
            ClipConfig.parse(str(path))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("strategy: adagc\nwarmup_steps: 010\n", AdaGC(warmup_steps=10)),
            ("strategy: adagc\nwarmup_steps: 1_000\n", AdaGC(warmup_steps=1000)),
            ("strategy: global_norm\nmax_norm: 010.5\n", GlobalNorm(10.5)),
            ("strategy: global_norm\nmax_norm: 1E3\n", GlobalNorm(1000.0)),
            ("strategy: global_norm\nmax_norm: +.5\n", GlobalNorm(0.5)),
            ("strategy: skip_step\non: loss\n", SkipStep(on="loss")),
            ("strategy: agc\ninclude_1d: True\n", AGC(include_1d=True)),
            ("base: &a {strategy: adagc}\n", None),
            ("gradient: &a {strategy: global_norm, max_norm: 2}\nupdate: *a\n", GlobalNorm(2.0)),
            ("gradient:\n  <<: &a {strategy: global_norm}\n  max_norm: 3\n", GlobalNorm(3.0)),
        ],
    )
    def test_what_a_person_reads(self, tmp_path, text, expected):
        """By YAML 1.1 the first is 8, and the field `on` is the key true."""
        path = tmp_path / "clip.yaml"
        path.write_text(text)
        if expected is None:
            with pytest.raises(SpecError, match="unknown key 'base'"):
                ClipConfig.parse(str(path))
        else:
            assert gradient(str(path)) == expected

    @pytest.mark.parametrize("number", ["1:30", "1:30.5", "0x10", "0o17", "0b11", "2026-11-28", "1__0"])
    def test_what_is_no_number(self, tmp_path, number):
        """By YAML 1.1 the first is 90."""
        path = tmp_path / "clip.yaml"
        path.write_text(f"strategy: global_norm\nmax_norm: {number}\n")
        with pytest.raises(SpecError, match=re.escape(f"GlobalNorm(max_norm={number!r}): must be a number")):
            ClipConfig.parse(str(path))

    @pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
    def test_what_is_neither_true_nor_false(self, tmp_path, word):
        path = tmp_path / "clip.yaml"
        path.write_text(f"gradient: none\nfold: {word}\n")
        with pytest.raises(SpecError, match=re.escape(f"fold={word!r}): must be true or false")):
            ClipConfig.parse(str(path))

    @pytest.mark.parametrize("row", ["[*x, *x, *x, *x, *x, *x, *x, *x, *x]", "{a: *x, b: *x, c: *x, d: *x, e: *x}"])
    def test_aliases_that_unfold_without_end(self, tmp_path, row):
        """Five or nine to the 24th values in 24 lines. Read in a process of its own, which can be stopped."""
        lines = ["x0: &x0 1"] + [f"x{i}: &x{i} {row.replace('*x', f'*x{i - 1}')}" for i in range(1, 25)]
        path = tmp_path / "clip.yaml"
        path.write_text("\n".join(lines) + "\n")
        read = f"from hf_gradclip import ClipConfig; ClipConfig.parse({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "with every alias written out it holds more than 1000 values" in done.stderr

    @pytest.mark.parametrize("tag", ["object/apply:builtins.open", "object/new:builtins.open", "name:os.system"])
    def test_a_file_with_code_in_it(self, tmp_path, tag):
        path, made = tmp_path / "clip.yaml", tmp_path / "made"
        path.write_text(f"gradient: !!python/{tag} [{made}, w]\n")
        words = f"is not YAML (could not determine a constructor for the tag 'tag:yaml.org,2002:python/{tag}'"
        with pytest.raises(SpecError, match=re.escape(words)):
            ClipConfig.parse(str(path))
        assert not made.exists()

    def test_a_file_that_refers_to_itself_or_is_deep(self, tmp_path):
        path = tmp_path / "clip.yaml"
        for text, words in (("gradient: &a [*a]", "it refers to itself"), ("[" * 5000, "it is nested too deep")):
            path.write_text(text)
            with pytest.raises(SpecError, match=words):
                ClipConfig.parse(str(path))

    def test_missing(self):
        with pytest.raises(SpecError, match=r"cannot read 'no/such/file\.yaml'"):
            ClipConfig.parse("no/such/file.yaml")

    def test_a_folder(self, tmp_path):
        (tmp_path / "folder.yaml").mkdir()
        with pytest.raises(SpecError, match="cannot read"):
            ClipConfig.parse(str(tmp_path / "folder.yaml"))


@pytest.mark.usefixtures("user")
class TestDottedPath:
    def test_a_users_strategy(self):
        from my_clips import Halve

        assert gradient("my_clips.Halve") == Halve()
        assert gradient("my_clips.Halve:factor=0.25") == Halve(factor=0.25)
        assert gradient({"strategy": "my_clips.Halve", "factor": 0.25}) == Halve(factor=0.25)
        assert gradient("zclip+my_clips.Halve") == Chain((ZClip(), Halve()))
        assert gradient("my_clips.Halve:factor=1e+2+zclip") == Chain((Halve(factor=100), ZClip()))

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("my_clips.Halv", "'my_clips.Halv' is no strategy, no preset, and cannot be imported"),
            ("my_clip.Halve", "'my_clip.Halve' is no strategy, no preset, and cannot be imported"),
            ("my_clip.Halve", "put the folder of its file on PYTHONPATH"),
            ("my_clips.number", "'my_clips.number' is not a subclass of hf_gradclip.Strategy"),
            ("my_clips.Halve:facto=1", "my_clips.Halve has no field 'facto'. Did you mean factor? It has factor."),
            ("my_clips.NoDataclass", "dataclass"),
            ("my_clips.Abstract", "abstract"),
            ("hf_gradclip.Strategy", "hf_gradclip.Strategy"),
            ("hf_gradclip.strategy.Chain", "hf_gradclip.strategy.Chain"),
            ("hf_gradclip.strategy.Chain:parts=1", "parts"),
            ("hf_gradclip.strategy.Chain:parts=ab", "parts"),
            ("os.path", "'os.path' is not a subclass"),
            ("a..b", "'a..b' is no strategy"),
            (".zclip", "'.zclip' is no strategy"),
            ("zclip.", "'zclip.' is no strategy"),
            (".", "'.' is no strategy"),
        ],
    )
    def test_wrong(self, spec, words):
        with pytest.raises(SpecError, match=re.escape(words)):
            ClipConfig.parse(spec)


class TestWrong:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (
                "zclp",
                [
                    "clip='zclp'",
                    "no strategy or preset is called 'zclp'.",
                    "Did you mean zclip?",
                    "Known: ada_clip, adagc",
                ],
            ),
            ("adaptiv", ["clip='adaptiv'", "Did you mean adaptive?"]),
            ("zclip+adgc", ["clip='zclip+adgc'", "no strategy or preset is called 'adgc'. Did you mean adagc?"]),
            ("qqqq", ["no strategy or preset is called 'qqqq'. Known: "]),
            ("", ["clip=''", "a strategy needs a name. Known: "]),
            (" ", ["a strategy needs a name"]),
            (":max_norm=1", ["a strategy needs a name"]),
            ("zclip+", ["clip='zclip+'", "no strategy or preset is called 'zclip+'. Did you mean zclip?"]),
            ("zclip:", ["'' is not key=value. Write zclip:key=value,key=value."]),
            ("zclip:alpha", ["'alpha' is not key=value. Write zclip:key=value"]),
            ("zclip:alpha=", ["'alpha=' is not key=value"]),
            ("zclip:=1", ["'=1' is not key=value"]),
            ("zclip:alpha=0.5,", ["'' is not key=value"]),
            ("zclip:alpha=0.5,alpha=0.6", ["alpha is given twice"]),
            ("zclip:aplha=0.5", ["zclip has no field 'aplha'. Did you mean alpha?", "It has z_threshold, alpha,"]),
            ("adaptive_norm:alpha=1", ["adaptive_norm has no field 'alpha'. It has no fields."]),
            (
                "adaptive:z_threshold=3",
                [
                    "adaptive is adaptive_norm+agc:include_adapters=false, so it takes no keys, and",
                    "z_threshold came with it.",
                ],
            ),
            ({"strategy": "adaptive", "alpha": 0.5}, ["so it takes no keys, and alpha came with it"]),
            ("none:max_norm=1", ["none has no field 'max_norm'. It has no fields."]),
            ("value", ["value needs a value for max_value. Write value:max_value=1."]),
            ("param_norm", ["param_norm needs a value for max_norm. Write param_norm:max_norm=1."]),
            ("2:max_norm=1", ["no strategy or preset is called '2'"]),
            ("0", ["0: is no limit. To switch clipping off use clip='none'."]),
            (0, ["0: is no limit. To switch clipping off use clip='none'."]),
            (0.0, ["0: is no limit"]),
            (-1, ["GlobalNorm(max_norm=-1): must be > 0. To switch clipping off use clip='none'."]),
            ("-1", ["clip='-1'", "GlobalNorm(max_norm=-1): must be > 0."]),
            (math.nan, ["GlobalNorm(max_norm=nan): must be > 0."]),
            ("nan", ["GlobalNorm(max_norm=nan): must be > 0."]),
            (10**400, ["GlobalNorm(max_norm=...): too large for a float."]),
            (True, ["True: is no strategy.", "'none' measures and logs only."]),
            (False, ["False: is no strategy.", "'none' measures and logs only."]),
            ("true", ["no strategy or preset is called 'true'"]),
            (
                "global_norm:max_norm=0",
                ["GlobalNorm(max_norm=0): must be > 0. To switch clipping off use clip='none'."],
            ),
            ("global_norm:max_norm=high", ["GlobalNorm(max_norm='high'): must be a number."]),
            ("global_norm:max_norm=true", ["GlobalNorm(max_norm=True): must be a number."]),
            ("global_norm:max_norm=none", ["GlobalNorm(max_norm=None): must be a number."]),
            ("global_norm:norm_type=1", ["GlobalNorm(norm_type=1): must be 2 or inf."]),
            ("param_norm:max_norm=-2", ["ParamNorm(max_norm=-2): must be > 0."]),
            ("value:max_value=0", ["Value(max_value=0): must be > 0."]),
            ("autoclip:percentile=120", ["AutoClip(percentile=120): must be in (0, 100]. The paper uses 10."]),
            ("autoclip:percentile=0", ["AutoClip(percentile=0): must be in (0, 100]. The paper uses 10."]),
            ("autoclip:window=0", ["AutoClip(window=0): must be from 1 to 1000000. The default is 1000."]),
            ("autoclip:window=2.5", ["AutoClip(window=2.5): must be a whole number."]),
            ("zclip:mode=fast", ["ZClip(mode=fast): must be safe or reference."]),
            ("zclip:alpha=1", ["ZClip(alpha=1): must be in [0, 1). The paper uses 0.97."]),
            ("zclip:warmup_steps=1", ["ZClip(warmup_steps=1): must be >= 2", "The paper uses 25."]),
            ("zclip:z_threshold=inf", ["ZClip(z_threshold=inf): must be finite, and must be > 0. The paper uses 2.5."]),
            ("adagc:beta=1", ["AdaGC(beta=1): must be in [0, 1). The paper uses 0.99."]),
            ("adagc:release_after=0", ["AdaGC(release_after=0): must be >= 1. The default is 50."]),
            ("value:max_value=1+zclip", ["nothing may follow value", "Put value last."]),
            ("value:max_value=1+value:max_value=2", ["nothing may follow value", "Put value last."]),
            ("none+value:max_value=1+none", ["none+value:max_value=1+none", "nothing may follow value"]),
            (
                {"strategy": "zclip", "z": 5},
                ["clip={'strategy': 'zclip', 'z': 5}: zclip has no field 'z'. It has z_threshold,"],
            ),
            ("zclip,alpha=0.9", ["'zclip,alpha=0.9' is no strategy. After the name comes a colon: zclip:alpha=0.9."]),
            ("zclip,alpha=1", ["'zclip,alpha=1' is no strategy. After the name comes a colon: zclip:alpha=1."]),
            ("None", ["'None' is text. To clip by max_grad_norm give no clip, in YAML `clip: null`; 'none' measures"]),
            (
                {"strategy": "zclip", "record": True},
                ["record is of the whole configuration: {'gradient': ..., 'record'"],
            ),
            ("zclip:warmup_steps=99999999999999999999", ["ZClip(warmup_steps=99999999999999999999)", "below 2^63"]),
            ({}, ["clip={}: says nothing about the gradient. Add 'gradient': 'adaptive', say, or 'none'."]),
            ({"nonfinite": "skip"}, ["says nothing about the gradient"]),
            (
                {"gradent": "zclip"},
                ["unknown key 'gradent'. Did you mean gradient?", "A whole configuration has "],
            ),
            ({"stratgy": "zclip"}, ["unknown key 'stratgy'. Did you mean strategy?"]),
            ({1: "zclip"}, ["unknown key 1."]),
            ({"gradient": None}, ["{'gradient': None}: must name a strategy. 'none' measures and logs only."]),
            ({"gradient": {"gradient": "zclip"}}, ["'strategy' must be a name"]),
            ({"gradient": [1]}, ["a list is no spec"]),
            (
                {"gradient": "zclip", "nonfinite": "skp"},
                ["nonfinite='skp'", "skip or raise or pass", "mean skip?"],
            ),
            ({"gradient": "zclip", "max_consecutive_skips": 0}, ["max_consecutive_skips=0", "whole number >= 1"]),
            ({"gradient": "zclip", "max_consecutive_skips": 2.0}, ["max_consecutive_skips=2.0", "whole number >= 1"]),
            ({"strategy": "zclip", "alfa": 1}, ["zclip has no field 'alfa'. Did you mean alpha?"]),
            ({"strategy": "zclip", 3: 1}, ["the key 3 must be a word"]),
            ({"strategy": None}, ["'strategy' must be a name. Known: ada_clip, adagc"]),
            ({"strategy": "zclip", "nonfinite": "skip"}, ["zclip has no field 'nonfinite'"]),
            ({"strategy": "zclip", "alpha": "0.5"}, ["ZClip(alpha='0.5'): must be a number."]),
            ({"strategy": "zclip", "alpha": [1]}, ["ZClip(alpha=[1]): must be a number."]),
            (["zclip"], ["clip=['zclip']: a list is no spec. Write a name, a number or a dict."]),
            (ZClip, ["is no spec. Write a name, a number or a dict."]),
            (1j, ["a complex is no spec"]),
            pytest.param(
                10**5000,
                ["clip=(int with thousands of digits): GlobalNorm(max_norm=...): too large for a float."],
                id="10**5000",
            ),
            ({"gradient": []}, ["clip={'gradient': []}: a list is no spec."]),
            ({"strategy": "zclip", "gradient": "agc"}, ["of the whole configuration: {'gradient': ...} alone."]),
            (
                {"*": "agc", "max_consecutive_skips": 5},
                ["'max_consecutive_skips' beside patterns: it is of the whole", "{'gradient': {'*': ...}, 'max_cons"],
            ),
            ({"gradient": {"*": "agc", "nonfinite": "raise"}}, ["'nonfinite' beside patterns"]),
            ({"gradient": "agc", "embed*": 1.0}, ["'gradient' beside patterns", "{'gradient': {'*': ...}}. For"]),
            ({"gradient": "agc", "update": []}, ["update=[]: a list is no spec."]),
            pytest.param(
                {"gradient": "zclip", "check_every": -(10**5000)},
                ["clip=(dict with thousands of digits): a whole number of thousands of digits is no value."],
                id="a dict with 10**5000",
            ),
            ("agc:unit_axis=true", ["AGC(unit_axis=True): must be a whole number or none."]),
            (b"zclip", ["a bytes is no spec"]),
        ],
        ids=repr,
    )
    def test_the_message_has_what_was_typed_the_rule_and_the_fix(self, spec, words):
        with pytest.raises(SpecError) as error:
            ClipConfig.parse(spec)
        for word in words:
            assert word in str(error.value)

    def test_none_without_max_grad_norm(self):
        with pytest.raises(SpecError, match="clip=None: means what max_grad_norm says, and there is none here"):
            ClipConfig.parse(None)

    @pytest.mark.parametrize("max_grad_norm", [-1.0, math.nan, "high", True])
    def test_a_wrong_max_grad_norm(self, max_grad_norm):
        with pytest.raises(SpecError):
            ClipConfig.parse(None, max_grad_norm=max_grad_norm)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"nonfinite": "rase"}, "ClipConfig(nonfinite='rase'): must be skip or raise or pass. Did you mean raise?"),
            ({"nonfinite": 3}, "ClipConfig(nonfinite=3): must be skip or raise or pass."),
            ({"max_consecutive_skips": -1}, "ClipConfig(max_consecutive_skips=-1): must be a whole number >= 1."),
            ({"max_consecutive_skips": True}, "ClipConfig(max_consecutive_skips=True): must be a whole number"),
        ],
    )
    def test_wrong_settings(self, settings, words):
        with pytest.raises(SpecError, match=re.escape(words)):
            ClipConfig.parse("zclip", **settings)

    def test_a_config_holds_a_strategy(self):
        with pytest.raises(SpecError, match=re.escape("ClipConfig(gradient='zclip'): must be a Strategy.")):
            ClipConfig("zclip")

    def test_a_spec_error_is_a_value_error(self):
        assert issubclass(SpecError, ValueError)

    def test_a_chain_of_one_or_of_chains_is_refused(self):
        with pytest.raises(SpecError, match="two strategies or more"):
            Chain((ZClip(),))
        with pytest.raises(SpecError, match="cannot hold a chain"):
            Chain((ZClip(), Chain((ZClip(), ZClip()))))


def parses_or_says_why(spec: object, **settings: object) -> None:
    try:
        config = ClipConfig.parse(spec, **settings)
    except SpecError:
        return
    assert isinstance(config, ClipConfig)


FIELDS = [
    "max_norm",
    "norm_type",
    "max_value",
    "alpha",
    "mode",
    "window",
    "percentile",
    "gradient",
    "strategy",
    "nonfinite",
]
VALUES = ["1", "-1", "0", "1e-3", "1e+3", "inf", "-inf", "nan", "true", "none", "safe", "reference", "9" * 400, "x"]
MARKS = [*":=,+. \t\n'\"[]{}/\\-_", "\x00", "é", ".yaml", "a.b", "strategy"]
PIECES = [*strategy_names(), *preset_names(), *FIELDS, *VALUES, *MARKS]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(PIECES)
OBJECTS = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(PIECES) | PLAIN, inner, max_size=4)
    ),
    max_leaves=8,
)
DICTS = st.dictionaries(st.sampled_from(FIELDS), OBJECTS, max_size=5)
QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


class TestFuzz:
    @QUICK
    @given(st.text(max_size=40))
    def test_text(self, text):
        parses_or_says_why(text)

    @QUICK
    @given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
    @example("zclip:" + "alpha=1," * 3)
    @example("global_norm:max_norm=" + "9" * 5000)
    def test_text_made_of_real_pieces(self, text):
        parses_or_says_why(text)

    @QUICK
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(strategy_names() + preset_names()),
                st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), max_size=2),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def test_well_formed_chains(self, parts):
        parses_or_says_why(
            "+".join(f"{name}:{','.join(f'{k}={v}' for k, v in keys)}".strip(":") for name, keys in parts)
        )

    @QUICK
    @given(OBJECTS)
    def test_python_objects(self, spec):
        parses_or_says_why(spec)

    @QUICK
    @given(DICTS, st.sampled_from([*strategy_names(), *preset_names()]))
    @example({"mode": 10**5000}, "zclip")
    @example({"window": -(10**5000)}, "autoclip")
    def test_dicts_of_one_strategy(self, values, name):
        parses_or_says_why({**values, "strategy": name})

    @QUICK
    @given(DICTS)
    def test_dicts_of_a_configuration(self, values):
        values.pop("strategy", None)
        parses_or_says_why(values)

    @QUICK
    @given(OBJECTS, OBJECTS, OBJECTS)
    def test_settings(self, max_grad_norm, nonfinite, max_consecutive_skips):
        words = {"nonfinite": nonfinite, "max_consecutive_skips": max_consecutive_skips}
        parses_or_says_why("zclip", **words)
        parses_or_says_why(None, max_grad_norm=max_grad_norm, **words)


class TestUpdate:
    def test_both_places_in_one_spec(self, tmp_path):
        spec = {"gradient": "zclip:z_threshold=3", "update": "block_rms:max_rms=0.5"}
        text = "gradient: zclip:z_threshold=3\nupdate: {strategy: block_rms, max_rms: 0.5}\n"
        (tmp_path / "both.yaml").write_text(text)
        config = ClipConfig.parse(spec)
        assert config == ClipConfig.parse(str(tmp_path / "both.yaml"))
        assert config == ClipConfig.parse("zclip:z_threshold=3", update="block_rms:max_rms=0.5")
        assert "update block_rms:max_rms=0.5" in str(config)
        assert config.of_update().gradient == ClipConfig.parse("block_rms:max_rms=0.5").gradient
        assert ClipConfig.parse({**spec, "update": None}).update is None
        with pytest.raises(ValueError, match="update is None"):
            ClipConfig.parse("zclip").of_update()

    @pytest.mark.parametrize(
        ("update", "words"),
        [
            ("skip_step", r"ClipConfig\(update=skip_step\).*cannot be left out. Put skip_step under 'gradient'"),
            ("skip_step+zclip", "Put skip_step under 'gradient'"),
            ("block_rsm", "Did you mean block_rms"),
            (0, "is no limit"),
        ],
    )
    def test_what_cannot_be(self, update, words):
        with pytest.raises(SpecError, match=words):
            ClipConfig.parse({"gradient": "zclip", "update": update})


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)], ids=repr)
def test_numbers_of_other_kinds_are_numbers(number) -> None:
    wanted = ClipConfig.parse(0.5)
    for spec in (number, {"strategy": "global_norm", "max_norm": number}):
        config = ClipConfig.parse(spec)
        assert config == wanted
        assert str(config) == str(wanted)
    steps = ClipConfig.parse({"strategy": "zclip", "warmup_steps": np.int64(7)}).gradient.warmup_steps
    assert (steps, type(steps)) == (7, int)
