"""Groups of parameters with a strategy each: against a clipper for each group, and equations in NumPy."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import ClipConfig, Clipper, optim
from hf_gradclip.budgets import Budgets
from hf_gradclip.fold import Fold
from hf_gradclip.patterns import Group
from hf_gradclip.run.startup import in_force
from hf_gradclip.state import flatten
from hf_gradclip.strategy import SpecError, describe
from hf_gradclip.views import view_of
from tests.tiny import SkipThird, tiny_llama

THREE = "embed*=global_norm:max_norm=0.5;*self_attn*=agc:clip_factor=0.2;*=adaptive_norm"
APART = {
    "embed": ("global_norm:max_norm=0.5", lambda name: "embed" in name),
    "rest": ("adaptive_norm", lambda name: "embed" not in name and "self_attn" not in name),
}


def gradients(model: nn.Module, step: int, loud: dict[int, str] | None = None) -> None:
    """Noise whose size varies by step; in a loud step every gradient whose name has the word is 300 times as large."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * (1 + 0.2 * math.sin(step)) / p.numel() ** 0.5
        p.grad = noise * (300 if (loud or {}).get(step, "nothing") in name else 1)


class Named(nn.Module):
    """Parameters of some names and sizes."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            module: nn.Module = self
            *path, leaf = name.split("__")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(torch.zeros(size)))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "name", "found"),
        [
            ("embed*", "model.embed_tokens.weight", True),
            ("embed*", "model.token_embed.weight", False),
            ("*embed*", "model.token_embed.weight", True),
            ("lm_head.weight", "lm_head.weight", True),
            ("head.weight", "lm_head.weight", False),
            ("weight", "a.b.weight", True),
            ("*lora_[AB]*", "base.q.lora_A.default.weight", True),
            ("*lora_[AB]*", "base.q.lora_E.default.weight", False),
            ("layers.?.mlp*", "model.layers.3.mlp.up.weight", True),
            ("layers.?.mlp*", "model.layers.13.mlp.up.weight", False),
            ("*", "anything", True),
            ("re:q_proj|k_proj", "model.layers.0.q_proj.weight", True),
            ("re:^q_proj", "model.layers.0.q_proj.weight", False),
            (r"re:layers\.[0-9]\.", "model.layers.7.mlp.weight", True),
            ("Embed*", "model.embed_tokens.weight", False),
        ],
    )
    def test_a_glob_is_for_the_whole_name_or_a_tail_and_a_regex_is_searched_for(self, pattern, name, found) -> None:
        group = Group(pattern, ClipConfig.parse("none").gradient)
        assert group.finds(name) is found

    def test_the_first_pattern_wins(self) -> None:
        model = Named(a=3, b=3)
        clipper = Clipper.for_model(model, "a=global_norm:max_norm=1;re:a|b=global_norm:max_norm=100")
        for p in model.parameters():
            p.grad = torch.full((3,), 1000.0)
        clipper.step()
        assert model.a.grad.norm().item() == pytest.approx(1, rel=1e-6)
        assert model.b.grad.norm().item() == pytest.approx(100, rel=1e-6)

    @pytest.mark.parametrize(
        ("pattern", "label"),
        [
            ("*", "rest"),
            ("embed*", "embed"),
            ("*lora_*", "lora"),
            ("lm_head.weight", "lm_head_weight"),
            ("re:(q|k)_proj", "q_k_proj"),
        ],
    )
    def test_a_label_is_made_of_the_pattern(self, pattern, label) -> None:
        assert Group(pattern, ClipConfig.parse("none").gradient).label == label


class TestSpec:
    def test_text_dict_and_yaml_mean_the_same(self, tmp_path) -> None:
        text = ClipConfig.parse("embed*=global_norm:max_norm=1;*lora_* as adapters=adaptive_norm;*=adaptive")
        groups = {"embed*": 1.0, "*lora_*": {"clip": "adaptive_norm", "name": "adapters"}, "*": "adaptive"}
        assert ClipConfig.parse(groups) == text
        assert ClipConfig.parse({"groups": groups}) == text
        assert ClipConfig.parse({"gradient": groups, "nonfinite": "skip"}) == text
        file = tmp_path / "clip.yaml"
        file.write_text(
            "gradient:\n  embed*: {strategy: global_norm, max_norm: 1}\n"
            "  '*lora_*': {strategy: adaptive_norm, name: adapters}\n  '*': adaptive\n"
        )
        assert ClipConfig.parse(str(file)) == text
        alone = tmp_path / "groups.yaml"
        alone.write_text("embed*: 1\n'*lora_*': {clip: adaptive_norm, name: adapters}\n'*': adaptive\n")
        assert ClipConfig.parse(str(alone)) == text

    def test_what_is_described_can_be_parsed(self) -> None:
        for spec in (THREE, "re:q_proj|k_proj as qk=adagc;*=adaptive_norm+value:max_value=1", {"a.b": 2}):
            config = ClipConfig.parse(spec)
            assert isinstance(config.gradient, Budgets)
            assert ClipConfig.parse(describe(config.gradient)) == config

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("embed*=", ["'embed*=' is no group", "pattern=strategy"]),
            ("embed*=1;;x", ["'x' is no group"]),
            ("em bed=1;*=1", ["'em bed'", "without spaces"]),
            ("embed* as a/b=1;*=1", ["'a/b'", "letters, digits"]),
            ("a*=1;a*=2", ["pattern 'a*'", "Leave one out"]),
            ("embed*=1;embed.*=2", ["label 'embed'", "pattern as name"]),
            ("embed*=zclipp;*=1", ["group 'embed*'", "Did you mean zclip?"]),
            ("re:(=1;*=1", ["'re:('", "no regular expression"]),
            ({"groups": 3}, ["groups=3", "'embed*': 1.0"]),
            ({"groups": {}}, ["must hold a pattern"]),
            ({"groups": {"a": 1}, "x": 1}, ["'x' beside 'groups'"]),
            ({"embed*": {"strategy": "global_norm", "max_nrm": 1}}, ["Did you mean max_norm?"]),
            ({"embed*": {"clip": 1, "name": 3}}, ["name=3"]),
            ({"a.b": {"c.d": 1.0}}, ["cannot hold groups"]),
            ({"*": None}, ["group '*'"]),
        ],
    )
    def test_a_wrong_spec_is_named(self, spec, words) -> None:
        with pytest.raises(SpecError) as error:
            ClipConfig.parse(spec)
        for word in words:
            assert word in str(error.value)

    def test_a_chain_holds_no_groups(self) -> None:
        groups = ClipConfig.parse(THREE).gradient
        with pytest.raises(SpecError, match="cannot hold groups"):
            type(ClipConfig.parse("adaptive").gradient)((groups, ClipConfig.parse("adagc").gradient))


class TestModel:
    def test_an_uncovered_parameter_is_an_error(self) -> None:
        with pytest.raises(SpecError, match=r"no pattern finds c, b\.w, which would not be clipped.*\*=none"):
            Clipper.for_model(Named(a=2, b__w=2, c=2), "a=1")

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [("emb_tokens", "embed_tokens.weight"), ("lm_head", r"'\*lm_head\*'"), ("re:zzz", "Leave group 1 out")],
    )
    def test_a_pattern_that_finds_nothing_is_an_error(self, pattern, words) -> None:
        model = Named(embed_tokens__weight=2, lm_head__weight=2)
        with pytest.raises(SpecError, match=f"the pattern {pattern!r} finds no parameter.*{words}"):
            Clipper.for_model(model, f"{pattern}=1;*=1")

    def test_a_pattern_behind_the_rest_is_an_error(self) -> None:
        """The exception after the rule, which would never act."""
        with pytest.raises(SpecError, match=r"'embed\*' stands behind '\*', which has all parameters. Put it in front"):
            Clipper.for_model(Named(embed=2, w=2), "w=1;*=none;embed*=1")

    @pytest.mark.parametrize(
        ("spec", "idle"),
        [
            ("em*=none;embed*=1;*=3", "'embed*'"),
            ("em*=1;re:d=2;*bed as other=3;*=1", "'re:d' and '*bed'"),
            ("embed=1;embed* as others=2;*=3", ""),  # another parameter is left for it
            ("embed=1;embed_in=2;w=3;re:.*=4", ""),  # the rest by another name
        ],
    )
    def test_a_pattern_whose_parameters_are_all_taken_is_said(self, spec, idle, caplog) -> None:
        Clipper.for_model(Named(embed=2, embed_in=2, w=2) if not idle else Named(embed=2, w=2), spec)
        said = [line for line in caplog.messages if "is in groups before it" in line]
        assert len(said) == bool(idle)
        assert all(f"all that {idle} finds" in line for line in said)

    def test_a_pattern_may_find_frozen_parameters_alone_and_the_rest_may_be_empty(self) -> None:
        model = Named(embed=2, w=2)
        model.embed.requires_grad_(False)
        clipper = Clipper.for_model(model, "embed*=1;w=global_norm:max_norm=2;*=1")
        model.w.grad = torch.full((2,), 30.0)
        clipper.step()
        assert model.w.grad.norm().item() == pytest.approx(2)
        assert not [key for key in clipper.report.scalars() if "/embed/" in key or "/rest/" in key]

    def test_a_parameter_that_is_trained_later_is_in_its_group_or_an_error(self) -> None:
        for spec, covered in (("w=global_norm:max_norm=2;late=global_norm:max_norm=3", True), ("w=1;late.x=1", False)):
            model = Named(w=2, late=2) if covered else Named(w=2, late__x=2)
            late = model.late if covered else model.late.x
            late.requires_grad_(False)
            clipper = Clipper.for_model(model, spec)
            model.w.grad = torch.full((2,), 30.0)
            clipper.step()
            late.requires_grad_(True)
            if not covered:
                model.other = nn.Parameter(torch.zeros(1))
            for p in model.parameters():
                p.grad = torch.full_like(p, 30.0)
            if covered:
                clipper.step()
                assert late.grad.norm().item() == pytest.approx(3)
            else:
                with pytest.raises(SpecError, match="no pattern finds other"):
                    clipper.step()

    def test_agc_may_differ_by_group_and_tells_what_it_leaves_alone(self) -> None:
        model = tiny_llama()
        spec = "*self_attn*=agc:clip_factor=0.1;*mlp*=agc:clip_factor=0.3,unit_axis=1;"
        spec += "lm_head*=agc:clip_factor=0.2,include_head=true;*=none"
        clipper = Clipper.for_model(model, spec)
        gradients(model, 0)
        before = grads(model)
        clipper.step()
        for name, p in model.named_parameters():
            factor, axis = next(
                (
                    (f, a)
                    for word, f, a in (("self_attn", 0.1, 1), ("mlp", 0.3, 0), ("lm_head", 0.2, 1))
                    if word in name
                ),
                (math.inf, 1),
            )
            was = before[name].double().numpy()
            if p.ndim < 2 or factor == math.inf:
                assert torch.equal(p.grad, before[name])
                continue
            size = np.linalg.norm(was, axis=axis, keepdims=True)
            limit = factor * np.maximum(np.linalg.norm(p.detach().double().numpy(), axis=axis, keepdims=True), 1e-3)
            right = was * np.minimum(1, limit / size)
            assert np.abs(p.grad.double().numpy() - right).max() < 1e-6 * np.abs(right).max()

    def test_agc_of_a_group_of_vectors_clips_nothing_and_says_so(self) -> None:
        with pytest.raises(SpecError, match=r"agc.*clips nothing here. All 5 trainable parameters"):
            Clipper.for_model(tiny_llama(), "*norm*=agc;*=adaptive_norm")


class TestStep:
    @pytest.mark.parametrize("loud", [{30: "embed", 33: "mlp", 36: "self_attn"}, {25: "", 44: "norm"}])
    def test_groups_are_clipped_as_models_of_their_own(self, loud) -> None:
        """Gradients against one clipper for each group that knows nothing of groups, through a NaN step."""
        model, twin = tiny_llama(), tiny_llama()
        clipper, apart, mine = Clipper.for_model(model, THREE), {}, {}
        for word, (spec, finds) in APART.items():
            mine[word] = [(name, p) for name, p in twin.named_parameters() if finds(name)]
            apart[word] = Clipper(ClipConfig.parse(spec), view_of(mine[word]))
        changed = dict.fromkeys(APART, 0)
        for step in range(60):
            gradients(model, step, loud)
            gradients(twin, step, loud)
            if step == 20:
                model.lm_head.weight.grad[0, 0] = math.nan
                assert math.isnan(float(clipper.step()))
                continue
            before, ours = grads(model), dict(model.named_parameters())
            clipper.step()
            for word, named in mine.items():
                apart[word].step()
                changed[word] += any(not torch.equal(before[name], ours[name].grad) for name, _ in named)
                assert all(torch.equal(p.grad, ours[name].grad) for name, p in named), step
        assert changed["embed"] == 59
        assert 0 < changed["rest"] < 20

    def test_one_tensor_starves_no_other(self) -> None:
        """Under one limit a tensor of 5e7 leaves the others next to nothing; in a group of its own it does not."""
        for spec, left in (("global_norm:max_norm=1", 2e-8), ("in_proj=1;*=global_norm:max_norm=1", 0.5)):
            model = Named(in_proj=4, w=4)
            model.in_proj.grad, model.w.grad = torch.full((4,), 2.5e7), torch.full((4,), 0.25)
            Clipper.for_model(model, spec).step()
            assert model.w.grad.norm().item() == pytest.approx(left * (0.5 if left < 0.1 else 1), rel=1e-5)

    def test_a_bound_in_one_group_leaves_the_others(self) -> None:
        model = Named(a=3, b=3)
        clipper = Clipper.for_model(model, "a=value:max_value=0.5;b=global_norm:max_norm=1")
        model.a.grad, model.b.grad = torch.tensor([0.1, 2.0, -9.0]), torch.tensor([0.0, 3.0, 4.0])
        clipper.step()
        assert model.a.grad.tolist() == pytest.approx([0.1, 0.5, -0.5])
        assert model.b.grad.tolist() == pytest.approx([0.0, 0.6, 0.8], rel=1e-6)

    def test_a_group_that_skips_skips_the_step(self) -> None:
        model = Named(a=3, b=3)
        groups = (Group("a", SkipThird()), Group("b", ClipConfig.parse(1.0).gradient))
        clipper = Clipper.for_model(model, Budgets(groups))
        skipped = []
        for _ in range(6):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            clipper.step()
            skipped.append(clipper.step_was_skipped)
            assert (model.b.grad is None) == skipped[-1]
        assert skipped == [False, False, True, False, False, False]

    def test_one_measurement_serves_all_groups(self, monkeypatch) -> None:
        model = tiny_llama()
        clipper = Clipper.for_model(model, THREE)
        calls = []
        measure = clipper.view.here.measure
        monkeypatch.setattr(clipper.view.here, "measure", lambda *args: calls.append(1) or measure(*args))
        gradients(model, 0)
        clipper.step()
        assert len(calls) == 1


class TestState:
    SPEC = "a.*=adagc:warmup_steps=2;b.*=zclip:warmup_steps=3;*=adaptive_tensors"
    SIZES: ClassVar = {"a__x": 2, "b__x": 3, "c__x": 4, "a__y": 2, "c__y": 4}

    def run(self, model: nn.Module, clipper: Clipper, steps: range) -> list[dict[str, Tensor]]:
        after = []
        for step in steps:
            for name, p in model.named_parameters():
                number = sum(map(ord, name)) % 7
                p.grad = torch.full_like(p, (1 + 0.3 * math.sin(3 * step + number)) * (30 if step % 9 == 8 else 1))
            clipper.step()
            after.append(grads(model))
        return after

    def test_goes_on_bit_for_bit_with_parameters_in_another_order(self) -> None:
        whole = Named(**self.SIZES)
        clipper = Clipper.for_model(whole, self.SPEC)
        self.run(whole, clipper, range(12))
        saved = clipper.state_dict()
        assert saved["groups"] == {"0": ["a.x", "a.y"], "1": ["b.x"], "2": ["c.x", "c.y"]}
        expected = self.run(whole, clipper, range(12, 30))
        for sizes in (self.SIZES, dict(reversed(self.SIZES.items()))):
            other = Named(**sizes)
            again = Clipper.for_model(other, self.SPEC)
            assert again.load_state_dict(saved) == ""
            found = self.run(other, again, range(12, 30))
            assert all(torch.equal(found[i][name], expected[i][name]) for i in range(18) for name in expected[i])
        assert any((expected[i]["c.x"] != expected[i - 1]["c.x"]).any() for i in range(1, 18))

    @pytest.mark.parametrize(
        ("spec", "why"),
        [
            ("re:[ac].x$=adagc:warmup_steps=2;b.*=zclip:warmup_steps=3;*=adaptive_tensors", "of other groups"),
            ("a.*=adagc;b.*=adagc;*=adaptive_tensors", "of a.*"),
            ("adaptive", "of a.*"),
        ],
    )
    def test_a_state_of_other_groups_starts_anew(self, spec, why) -> None:
        model = Named(**self.SIZES)
        clipper = Clipper.for_model(model, self.SPEC)
        self.run(model, clipper, range(5))
        again = Clipper.for_model(Named(**self.SIZES), spec)
        fresh = {key: value.clone() for key, value in flatten(again.state).items()}
        words = again.load_state_dict(clipper.state_dict())
        assert why in words
        assert "starts anew" in words
        assert all(torch.equal(value, fresh[key]) for key, value in flatten(again.state).items())

    def test_other_numbers_in_a_group_go_on(self) -> None:
        model = Named(**self.SIZES)
        clipper = Clipper.for_model(model, self.SPEC)
        self.run(model, clipper, range(5))
        again = Clipper.for_model(Named(**self.SIZES), self.SPEC.replace("zclip:", "zclip:z_threshold=3,"))
        assert "go on under" in again.load_state_dict(clipper.state_dict())
        mine, theirs = flatten(again.state), flatten(clipper.state)
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


class TestReport:
    def test_each_group_has_keys_of_its_own(self) -> None:
        model = Named(embed=4, w=4)
        clipper = Clipper.for_model(model, "embed as table=global_norm:max_norm=1;*=global_norm:max_norm=10")
        norms = [(0.5, 2.0), (4.0, 20.0), (2.0, 4.0), (0.25, 40.0)]
        for table, rest in norms:
            model.embed.grad, model.w.grad = torch.full((4,), table / 2), torch.full((4,), rest / 2)
            clipper.step()
        found = clipper.report.scalars()
        assert found["clip/norm_mean"] == pytest.approx(np.mean([math.hypot(*pair) for pair in norms]))
        assert found["clip/rate"] == 0.75
        assert found["clip/tensor_rate"] == 0.5
        assert "clip/threshold" not in found
        for label, column, limit, rate in (("table", 0, 1, 0.5), ("rest", 1, 10, 0.5)):
            sizes = [pair[column] for pair in norms]
            assert found[f"clip/{label}/norm_mean"] == pytest.approx(np.mean(sizes))
            assert found[f"clip/{label}/norm_max"] == pytest.approx(max(sizes))
            assert found[f"clip/{label}/norm_post"] == pytest.approx(min(sizes[-1], limit), rel=1e-6)
            assert found[f"clip/{label}/scale"] == pytest.approx(min(1, limit / sizes[-1]), rel=1e-6)
            assert found[f"clip/{label}/threshold"] == limit
            assert found[f"clip/{label}/rate"] == rate
        assert not [key for key in found if key.count("/") == 2 and key.endswith(("skipped", "nonfinite"))]
        assert clipper.report.closing_line().endswith("clipped by group: table 50.0%, rest 50.0%")
        assert clipper.report.scalars() == {}

    def test_a_still_group_is_no_cause_for_a_warning(self, caplog) -> None:
        model = Named(lora=2, w=2)
        clipper = Clipper.for_model(model, "lora=1;*=1")
        with caplog.at_level(logging.WARNING):
            for _ in range(30):
                model.lora.grad, model.w.grad = torch.zeros(2), torch.ones(2)
                clipper.step()
            clipper.report.scalars()
        assert "exactly 0" not in caplog.text

    def test_the_start_line_counts(self) -> None:
        model = tiny_llama()
        line = in_force(Clipper.for_model(model, THREE))
        rest = len(list(model.parameters())) - 1 - 8
        assert f"parameters by group: embed 1, self_attn 8, rest {rest}" in line


class TestElsewhere:
    @pytest.mark.parametrize("name", ["AdamW", "SGD"])
    def test_our_optimizers_equal_a_clipper_and_torch(self, name) -> None:
        more: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {"eps": 1e-4}
        model, twin = tiny_llama(), tiny_llama()
        ours = getattr(optim, name)(model.named_parameters(), lr=0.01, clip=THREE, **more)
        clipper = Clipper.for_model(twin, THREE)
        theirs = getattr(torch.optim, name)(twin.parameters(), lr=0.01, **more)
        clipped = 0
        for step in range(12):
            gradients(model, step, {8: "mlp"})
            gradients(twin, step, {8: "mlp"})
            ours.step()
            clipper.step()
            theirs.step()
            clipped += clipper.report.scalars()["clip/rest/rate"]
        assert 0 < clipped < 12
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p - q).detach().abs().max() < 2e-6 * max(1.0, float(q.detach().abs().max()))

    def test_an_update_is_clipped_by_group(self) -> None:
        """Against the limits: SGD's update is its momentum, of which each group keeps at most its own norm."""
        model = Named(a=4, b=4)
        optimizer = optim.SGD(
            model.named_parameters(), lr=1.0, update_clip="a=global_norm:max_norm=0.5;b=value:max_value=0.1"
        )
        model.a.grad, model.b.grad = torch.full((4,), 3.0), torch.tensor([0.05, 4.0, -4.0, 0.0])
        optimizer.step()
        assert model.a.detach().norm().item() == pytest.approx(0.5, rel=1e-5)
        assert model.b.tolist() == pytest.approx([-0.05, -0.1, 0.1, 0.0])
        assert optimizer.update_clipper.report.scalars()["clip_update/a/rate"] == 1.0

    def test_agc_cannot_be_for_updates_in_a_group_either(self) -> None:
        with pytest.raises(SpecError, match=r"update=agc.*goes by units"):
            ClipConfig.parse({"gradient": "none", "update": "embed*=agc;*=adaptive_norm"})

    def test_a_fused_optimizer_cannot_take_groups(self) -> None:
        model = Named(a=2, b=2)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with pytest.raises(SpecError, match="fold=True with a=global_norm"):
            Fold(optimizer, view_of(model), ClipConfig.parse("a=1;b=2").gradient, scale=True, skip=False)

    def test_a_group_is_a_frozen_dataclass(self) -> None:
        group = Group("a*", ClipConfig.parse(1.0).gradient)
        with pytest.raises(dataclasses.FrozenInstanceError):
            group.pattern = "b"
