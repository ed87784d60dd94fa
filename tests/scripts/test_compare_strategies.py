"""What differs between two runs of the comparison is how they clip: against loops of torch alone.

Where a test is of the comparison and not of training, nothing is trained: outcomes are made up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_gradclip.strategies import zclip

ROOT = Path(__file__).parents[2]
STEPS = 10
SMALL = ("decoder", "encoder", "recurrent", "convolutional")
OPTIMIZERS = {
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    names = ("training", "keys", "rows", "tables", "pictures", "tasks", "scratch", "smollm2", "sentences")
    parts = {name: importlib.import_module(f"compare_parts.{name}") for name in names}
    yield SimpleNamespace(command=importlib.import_module("compare_strategies"), **parts)
    parts["keys"].code_of.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def short(script, monkeypatch):
    """Small: of 10 steps 3 are the warm-up and 2 come before anything is broken; 4 examples a step, 32 held out."""
    monkeypatch.setattr(script.training, "RAMP", 0.3)
    monkeypatch.setattr(script.training, "UNBROKEN", 0.2)
    monkeypatch.setattr(script.training, "EVALUATED_AT_ONCE", 16)
    for name, task in script.tasks.TASKS.items():
        monkeypatch.setitem(script.tasks.TASKS, name, replace(task, batch_size=4, evaluated=32))
    return script


def run_of(script, **fields):
    """A short run; fields win."""
    plain = {"task": "recurrent", "optimizer": "adamw", "clip": "none", "lr": 4e-3, "data": "sound", "seed": 3}
    return script.training.Run(**{**plain, "steps": STEPS, **fields})


def arms_of(plain, clips):
    """The same run with each clip."""
    return {clip: replace(plain, clip=clip) for clip in clips}


class ByTorch:
    """The same run in a loop of torch: its losses, its norms, and whose gradient was `tensor` times too large."""

    def __init__(self, script, run, max_norm=math.inf, loud=1.0, tensor=1.0, one=1.0, noisy=False, wrong=False) -> None:
        task, broken = script.tasks.TASKS[run.task], script.training.broken_steps(run)
        self.data = task.data()
        torch.manual_seed(run.seed)
        self.model = task.model()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[run.optimizer](parameters, run.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 3, 1) * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        )
        drawn = torch.Generator().manual_seed(run.seed)
        self.start, self.losses, self.norms, self.loud = self.evaluated(), [], [], []
        for step in range(run.steps):
            chosen = torch.randint(32, len(self.data["labels"]), (task.batch_size,), generator=drawn)
            noise = task.noise(task.batch_size, drawn)
            place = int(torch.randint(len(parameters), (), generator=drawn))
            batch = noise if step in broken and noisy else {key: value[chosen] for key, value in self.data.items()}
            if step in broken and wrong:
                batch["labels"] = torch.stack([batch["labels"][i - 1] for i in range(task.batch_size)])
            loss = self.model(**batch).loss
            (loss * (loud if step in broken else 1.0)).backward()
            if step in broken:
                self.loud.append(place)
                parameters[place].grad *= tensor
                parameters[0].grad *= one
            self.losses.append(loss.item())
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.end = self.evaluated()

    @torch.no_grad()
    def evaluated(self) -> float:
        self.model.eval()
        loss = float(self.model(**{key: value[:32] for key, value in self.data.items()}).loss)
        self.model.train()
        return loss


def assert_same(outcome, expected) -> None:
    assert [outcome.start, outcome.end] == pytest.approx([expected.start, expected.end], rel=1e-5)
    assert outcome.losses == pytest.approx(expected.losses, abs=2e-4), "rounded to 4 digits"


@pytest.mark.parametrize(
    ("task", "optimizer"), [*product(SMALL, ["adamw"]), ("recurrent", "rmsprop"), ("recurrent", "momentum")]
)
def test_without_clipping_it_is_torch(short, task, optimizer) -> None:
    run = run_of(short, task=task, optimizer=optimizer, lr=min(short.training.RATES[optimizer]))
    outcome = short.training.train(run)
    assert_same(outcome, ByTorch(short, run))
    assert outcome.clipped == outcome.update_clipped == outcome.skipped == 0


def test_clipping_is_what_it_says(short) -> None:
    run = run_of(short, task="decoder", optimizer="momentum", clip="global_norm:max_norm=2", lr=0.1)
    outcome, expected = short.training.train(run), ByTorch(short, run, max_norm=2)
    assert_same(outcome, expected)
    assert outcome.end != pytest.approx(ByTorch(short, run).end, rel=1e-4)
    assert 0 < sum(norm > 2 for norm in expected.norms) < STEPS
    assert outcome.clipped == sum(norm > 2 for norm in expected.norms) / STEPS
    median = sum(sorted(expected.norms)[4:6]) / 2
    assert outcome.norm == pytest.approx(median, rel=1e-4), "before clipping"
    assert outcome.rise == pytest.approx(expected.norms[9] / expected.norms[5], rel=1e-4)


def test_how_norms_rise(script) -> None:
    """Of 30 steps the three last, and the three from the middle on; one of each stands out."""
    norms, found = [7.0] * 15 + [2.0, 2.0, 50.0] + [9.0] * 9 + [80.0, 3.0, 3.0], script.training.middle_and_rise
    assert found(norms, 30) == (7.0, 1.5)
    assert found(norms[:29], 30) == (None, None)
    assert found([*norms[:27], math.nan, math.inf, math.inf], 30) == (None, None)
    assert found([0.0] * 30, 30) == (None, None)
    assert found([4.0], 1) == (4.0, 1.0)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("loud", {"loud": 100.0}),
        ("tensor", {"tensor": 1000.0}),
        ("noise", {"noisy": True}),
        ("labels", {"wrong": True}),
        ("level", {"loud": 5.0}),
    ],
)
def test_broken_data_is_what_it_says(short, monkeypatch, data, fault) -> None:
    monkeypatch.setattr(short.training, "BROKEN", 0.4)
    run = run_of(short, data=data)
    outcome, expected, sound = short.training.train(run), ByTorch(short, run, **fault), ByTorch(short, run)
    assert_same(outcome, expected)
    assert outcome.end != pytest.approx(sound.end, rel=1e-4)
    assert len(set(expected.loud)) > 1, "not always the same tensor's gradient"


def test_one_tensor_starves_the_others(short, monkeypatch) -> None:
    """Under one limit for all; without it AdamW takes little notice."""
    monkeypatch.setattr(short.training, "BROKEN", 0.4)
    run = run_of(short, data="one", optimizer="momentum", lr=0.3, clip="global_norm:max_norm=1")
    outcome = short.training.train(run)
    assert_same(outcome, ByTorch(short, run, max_norm=1, one=10_000.0))
    assert outcome.end != pytest.approx(ByTorch(short, run, max_norm=1).end, rel=1e-3)


def test_what_is_broken(script) -> None:
    """A twentieth of the batches, none of the first 15 %, elsewhere for another seed."""
    found = [script.training.broken_steps(run_of(script, data="loud", steps=200, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert {len(steps) for steps in found} == {10}
    assert all(30 <= step < 200 for steps in found for step in steps)
    assert script.training.broken_steps(run_of(script, steps=200)) == set()
    assert script.training.broken_steps(run_of(script, data="level", steps=200)) == set(range(100, 200))


def test_update_is_clipped_where_it_is_asked_for(short) -> None:
    outcome = short.training.train(run_of(short, optimizer="rmsprop", clip="none/value:max_value=1", lr=1e-3))
    assert outcome.clipped == 0 < outcome.update_clipped  # its first update is ten times too large


def test_a_loss_that_is_not_finite_is_no_number(short) -> None:
    outcome = short.training.train(run_of(short, task="decoder", optimizer="momentum", lr=1e30))
    assert outcome.end is None
    stopped = short.training.train(run_of(short, task="decoder", optimizer="momentum", lr=1e30, clip="zclip", steps=60))
    assert stopped.end is None
    assert stopped.skipped == 20


@pytest.mark.parametrize("name", SMALL)
def test_noise_looks_like_the_data(script, name) -> None:
    task = script.tasks.TASKS[name]
    data, noise = task.data(), task.noise(5, torch.Generator().manual_seed(0))
    assert noise.keys() == data.keys()
    for key, value in data.items():
        assert noise[key].shape == (5, *value.shape[1:])
        assert noise[key].dtype == value.dtype
        if key == "labels" and value.ndim == 1:
            assert noise[key].max() <= value.max(), "no label that is not there"


@pytest.fixture
def pretrained(short, monkeypatch):
    """A small model and its bytes in the place of SmolLM2, which is not everywhere."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    tokenizer = lambda text: SimpleNamespace(input_ids=list(text.encode()[: 96 * 100]))  # noqa: E731
    monkeypatch.setattr(short.smollm2, "pretrained", functools.cache(lambda: (model, tokenizer)))
    for data in (short.smollm2.prose, short.smollm2.code):
        data.cache_clear()
    yield short
    for data in (short.smollm2.prose, short.smollm2.code):
        data.cache_clear()


@pytest.mark.parametrize("task", ["lora", "lora_code", "whole"])
def test_real_weights_are_trained_by_torch_too(pretrained, task) -> None:
    """With LoRA the adapters alone."""
    run = run_of(pretrained, task=task, lr=pretrained.tasks.TASKS[task].lr)
    expected = ByTorch(pretrained, run)
    assert_same(pretrained.training.train(run), expected)
    assert {p.requires_grad for p in expected.model.parameters()} == ({True, False} if task != "whole" else {True})


def test_a_sentence_encoder_learns_pairs(short, monkeypatch) -> None:
    """A small BERT in the place of MiniLM: the loss of a batch by hand, and a training like torch's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=300, max_position_embeddings=32, **sizes), add_pooling_layer=False)

    def tokenizer(texts, max_length, **fixed):
        return SimpleNamespace(
            input_ids=[[*text.encode()[:max_length], *[0] * max_length][:max_length] for text in texts]
        )

    monkeypatch.setattr(short.sentences, "pretrained", lambda: (bert, tokenizer))
    short.sentences.pairs.cache_clear()
    data = {key: value[:5] for key, value in short.sentences.pairs().items()}
    torch.manual_seed(3)
    model = short.tasks.TASKS["sentences"].model().eval()
    vectors = []
    for key in ("names", "descriptions"):
        rows = []
        for ids in data[key]:
            ids = ids[ids != 0]
            states = model.encoder(input_ids=ids[None]).last_hidden_state[0]
            rows.append(states.mean(0) / states.mean(0).norm())
        vectors.append(torch.stack(rows))
    logits = 20 * vectors[0] @ vectors[1].T
    expected = -torch.stack([row.log_softmax(0)[i] for i, row in enumerate(logits)]).mean()
    assert float(model(**data).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    swapped = -torch.stack([row.log_softmax(0)[i - 1] for i, row in enumerate(logits)]).mean()
    wrong = {**data, "labels": data["labels"].roll(1, 0)}
    assert float(model(**wrong).loss.detach()) == pytest.approx(float(swapped.detach()), rel=1e-5)
    run = run_of(short, task="sentences", lr=1e-4)
    monkeypatch.setattr(short.training, "EVALUATED_AT_ONCE", 32)
    assert_same(short.training.train(run), ByTorch(short, run))
    short.sentences.pairs.cache_clear()


def test_another_process_gives_the_same(script) -> None:
    run = run_of(script, clip="global_norm:max_norm=0.1", steps=4)
    here, elsewhere = (script.rows.Comparison(None, "", workers) for workers in (1, 2))
    for found in (here, elsewhere):
        found.run([run])
    assert here.outcomes == elsewhere.outcomes
    assert here.outcomes[run].clipped > 0


def test_the_95_percent_of_student(script) -> None:
    """The density of t, integrated from 0 to each number, holds half of 95 %."""
    for freedom, limit in enumerate(script.tables.T95, start=1):
        t = torch.linspace(0, limit, 100_001, dtype=torch.float64)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        area = torch.trapezoid(scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t).item()
        assert area == pytest.approx(0.475, abs=2e-8), freedom


def test_intervals(script) -> None:
    """Worked by hand: the mean, and t times the deviation over the root of the number."""
    assert script.tables.paired([3.0], [1.0]) == "+2.000"
    assert script.tables.paired([1.0, 2.0], [1.0, 3.0]) == "-0.500 [-6.853, +5.853]"  # 12.706 (0.7071 / 1.4142) = 6.353
    assert (
        script.tables.paired([4.0, 7.0, 1.0], [3.0, 3.0, 3.0]) == "+1.000 [-6.452, +8.452]"
    )  # 4.302653 (3 / 1.732051) = 7.4524
    five = script.tables.paired([0.0, 1.0, 2.0, 3.0, 4.0], [2.0] * 5)
    assert five == "+0.000 [-1.963, +1.963]"  # 2.776 (1.5811 / 2.2361) = 1.963
    lost = "no better than at the start in 1 of 2"
    assert script.tables.paired([math.inf, 1.0], [1.0, 1.0]) == lost
    assert script.tables.paired([1.0, 1.0], [1.0, math.inf]) == f"the other: {lost}"


def test_numbers_of_a_table(script) -> None:
    """Of runs that began at 20."""
    found = script.rows.Comparison(None, "", 1)
    plain, stock = run_of(script, seed=0), script.tables.STOCK
    ends = {
        ("none", "sound"): (3.0, 5.0),
        (stock, "sound"): (2.0, 5.0),
        ("zclip", "sound"): (1.0, 3.0),
        ("none/zclip", "sound"): (3.5, 5.5),
        ("none", "tensor"): (None, 6.0),
        (stock, "tensor"): (4.0, 6.0),
        ("zclip", "tensor"): (21.0, 4.0),
        ("none/zclip", "tensor"): (3.5, 5.5),
    }
    for (clip, data), by_seed in ends.items():
        for seed, end in enumerate(by_seed):
            run, share = run_of(script, clip=clip, data=data, seed=seed), 0.2 + 0.1 * seed
            norms = {"none": (7.0 + seed, 1.0 + seed), "zclip": (7.0, None if seed else 1.0)}.get(clip, (None, None))
            found.outcomes[run] = script.training.Outcome(run, 20.0, end, [], share, share / 2, 0, *norms)
    clips = ("none", stock, "zclip", "none/zclip")
    head, _, *rows = script.tables.detail(found, arms_of(plain, clips), ("sound", "tensor"), (0, 1)).splitlines()
    assert cells(head) == [
        *("clip", "sound", "clipped", "norm", "rise", "less `none`", f"less `{stock}`"),
        *("tensor", "less its own sound", "clipped", f"less `{stock}`, tensor"),
    ]
    lost, more = "no better than at the start in 1 of 2", "+0.500 [+0.500, +0.500]"
    assert [cells(row) for row in rows] == [
        ["`none`", "4.000", "25.0%", "7.5", "1.5", "", "+0.500 [-5.853, +6.853]", "-", lost, "25.0%", lost],
        [
            f"`{stock}`",
            "3.500",
            "25.0%",
            "-",
            "-",
            "-0.500 [-6.853, +5.853]",
            "",
            "5.000",
            "+1.500 [-4.853, +7.853]",
            "25.0%",
            "",
        ],
        [
            "`zclip`",
            "2.000",
            "25.0%",
            "7",
            "-",
            "-2.000 [-2.000, -2.000]",
            "-1.500 [-7.853, +4.853]",
            "-",
            lost,
            "25.0%",
            lost,
        ],
        [
            *("`none/zclip`", "4.500", "25.0% / 12.5%", "-", "-", more, "+1.000 [-5.353, +7.353]"),
            *("4.500", "+0.000 [+0.000, +0.000]", "25.0% / 12.5%", "-0.500 [-0.500, -0.500]"),
        ],
    ]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_a_bar_in_a_pattern_is_no_column(script) -> None:
    assert (
        script.tables.markdown(["clip"], [["`re:a|b=none;*=zclip`"]]).splitlines()[-1] == r"| `re:a\|b=none;*=zclip` |"
    )


def test_a_run_that_ends_where_it_began_is_lost(script) -> None:
    found, run = script.rows.Comparison(None, "", 1), run_of(script, seed=0)
    found.outcomes[run] = script.training.Outcome(run, 5.5, 5.5, [], 0.0, 0.0, 0)
    assert found.ends(run, [0]) == [math.inf]


def test_against_none_is_on_broken_data_too(script) -> None:
    """Seed by seed -1 and -2 on loud data; without being asked for, `none` is on sound data alone."""
    found, plain = script.rows.Comparison(None, "", 1), run_of(script, seed=0)
    for (clip, data), ends in {("none", "loud"): (5.0, 7.0), ("zclip", "loud"): (4.0, 5.0)}.items():
        for seed, end in enumerate(ends):
            for kind, value in (("sound", 3.0), (data, end)):
                run = run_of(script, clip=clip, data=kind, seed=seed)
                found.outcomes[run] = script.training.Outcome(run, 20.0, value, [], 0.0, 0.0, 0)
    arms = arms_of(plain, ("none", "zclip"))
    asked, unasked = (script.tables.detail(found, arms, ("sound", "loud"), (0, 1), o) for o in (["none"], []))
    assert cells(asked.splitlines()[0])[-1] == "less `none`, loud"
    assert [cells(row)[-1] for row in asked.splitlines()[2:]] == ["", "-1.500 [-7.853, +4.853]"]
    assert "less `none`, loud" not in unasked
    assert "less `none`" in unasked


def test_what_a_run_will_take(short, monkeypatch) -> None:
    """Three steps of 4 examples in 6 seconds; five such steps, and 32 examples that are looked at before and after."""
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(short.rows, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    short.rows.seconds_of.cache_clear()
    assert short.rows.seconds_of("recurrent", 5) == pytest.approx(6 / 12 * (5 * 4 + 32))
    assert short.rows.seconds_of("recurrent", 5) == pytest.approx(6 / 12 * (5 * 4 + 32)), "timed once"
    short.rows.seconds_of.cache_clear()


@pytest.fixture
def asked(script, monkeypatch):
    """The runs that were to be trained; they end at 5 plus how far their rate is from the best, of the seed's kind."""
    runs = []

    def train(run):
        print("trained", file=sys.stderr)
        runs.append(run)
        best = 0.004 if run.seed in script.rows.RATE_SEEDS else 0.001
        return script.training.Outcome(run, 20.0, 5 + abs(run.lr - best), [5.0], 0.25, 0.0, 0)

    facts = script.command.circumstances
    monkeypatch.setattr(
        script.command, "circumstances", lambda *given: {**facts(*given), "date": "today", "commit": "one"}
    )
    monkeypatch.setattr(script.rows, "seconds_of", lambda name, steps: 1800.0)
    monkeypatch.setattr(script.command, "missing", lambda task: [])
    monkeypatch.setattr(script.training, "train", train)
    for kind in ("curves", "intervals"):  # the rest of the table is what is looked at
        monkeypatch.setattr(script.pictures, kind, lambda *given: SimpleNamespace(savefig=lambda *to, **how: None))
    return runs


WORDS = ["--task", "recurrent", "--clip", "zclip", "global_norm:max_norm=1", "--seeds", "2", "--workers", "1"]
SEARCHED, JUDGED = 2 * 7, 3 * 3 * 2  # seeds and rates; kinds of data, clips and seeds


def test_the_rate_is_chosen_on_seeds_that_are_not_judged(script, asked) -> None:
    text = script.command.main(WORDS)
    searched, judged = asked[:SEARCHED], asked[SEARCHED:]
    assert len(judged) == JUDGED
    assert {(run.seed, run.clip, run.data) for run in searched} == {(1000, "none", "sound"), (1001, "none", "sound")}
    assert sorted({run.lr for run in searched}) == sorted(script.training.RATES["adamw"])
    assert {run.lr for run in judged} == {0.004}, "not 0.001, with which the others end lower"
    assert {run.seed for run in judged} == {0, 1}
    assert "20.000 at the start, lr 0.004\n" in text


@pytest.mark.parametrize("given", [(0.016, 0.032), (0.0005, 0.001)])
def test_rates_are_tried_until_the_best_is_between_two(script, asked, monkeypatch, given) -> None:
    """From either side of 0.004, twice or half the last one each time."""
    monkeypatch.setitem(script.training.RATES, "adamw", given)
    text = script.command.main(WORDS)
    assert {run.lr for run in asked if run.seed in script.rows.RATE_SEEDS} == {*given, 0.002, 0.004, 0.008}
    assert "lr 0.004\n" in text


def test_a_rate_at_the_edge_is_said(script, asked, monkeypatch) -> None:
    """Four times twice the highest, and it is still the best."""
    monkeypatch.setitem(script.training.RATES, "adamw", (0.0001, 0.0002))
    assert "lr 0.0032 (edge: none beyond it was tried)" in script.command.main(WORDS)


def test_a_rate_that_is_given_is_not_searched(script, asked) -> None:
    assert "lr 0.5\n" in script.command.main([*WORDS, "--lr", "0.5"])
    assert len(asked) == JUDGED


def test_a_task_with_a_rate_of_its_own_is_not_searched(script, asked) -> None:
    script.command.main([*WORDS, "--task", "lora"])
    assert len(asked) == JUDGED
    assert {run.lr for run in asked} == {5e-4}


def test_seeds_that_no_clip_was_chosen_on(script, asked) -> None:
    text = script.command.main([*WORDS, "--lr", "0.5", "--first_seed", "5"])
    assert {run.seed for run in asked} == {5, 6}
    assert "\n- seeds 5 to 6, 200 steps each" in text


def test_each_clip_at_the_rate_that_is_best_with_it(script, asked, monkeypatch) -> None:
    """0.004 for `none`, 0.032 for zclip; with the third the best is beyond all that is tried."""
    train, bests = script.training.train, {"none": 0.004, "zclip": 0.032, "global_norm:max_norm=1": 9.0}

    def by_clip(run):
        return replace(train(run), end=5 + abs(run.lr - bests[run.clip]) + 0.5 * (run.data == "loud"))

    monkeypatch.setattr(script.training, "train", by_clip)
    text = script.command.main([*WORDS, "--own_rates", "--data", "loud"])
    judged = [run for run in asked if run.seed not in script.rows.RATE_SEEDS]
    assert {(run.clip, run.lr) for run in judged} == {
        *(("none", 0.004), ("zclip", 0.032), ("global_norm:max_norm=1", 0.512))  # the highest of all, four times twice
    }
    where = "at a learning rate of its own (edge for `global_norm:max_norm=1`: none beyond it was tried)"
    assert f"20.000 at the start, each {where}\n" in text
    table = [cells(line) for line in text.splitlines() if line.startswith(("| clip", "| `"))]
    assert [row[:3] for row in table] == [
        ["clip", "lr", "sound"],
        ["`none`", "0.004", "5.000"],
        ["`zclip`", "0.032", "5.000"],
        ["`global_norm:max_norm=1`", "0.512", "13.488"],
    ]
    assert table[2][6:] == [
        "+0.000 [+0.000, +0.000]",
        "-8.488 [-8.488, -8.488]",
        "5.500",
        "+0.500 [+0.500, +0.500]",
        "25.0%",
        "-8.488 [-8.488, -8.488]",
    ]


def test_rates_of_their_own_are_searched_where_a_task_has_one_too(script, asked) -> None:
    script.command.main([*WORDS, "--task", "lora", "--own_rates"])
    assert {run.lr for run in asked if run.seed in (0, 1)} == {0.004}


def test_how_long_it_takes_is_said_before(script, asked, capsys) -> None:
    script.command.main(WORDS)
    lines = capsys.readouterr().err.splitlines()
    later = f"; then {JUDGED}, about 9.0 core-hours, but for those that have a row"
    assert lines[:2] == [f"{SEARCHED} runs, about 7.0 core-hours{later}", "trained"]
    assert re.match(rf"1 of {SEARCHED}, 0\.\d h left: Outcome\(", lines[2])
    assert lines[2 * SEARCHED + 1 :][:2] == [f"{JUDGED} runs, about 9.0 core-hours", "trained"]


def test_an_interrupted_comparison_goes_on(script, asked, monkeypatch, tmp_path) -> None:
    train, whole, stopped = script.training.train, tmp_path / "whole" / "out", tmp_path / "stopped" / "out"
    expected = script.command.main([*WORDS, "--out", str(whole)])
    (path,) = whole.glob("compare_adamw_*.jsonl")
    assert len(path.read_text("utf-8").splitlines()) == SEARCHED + JUDGED
    assert path.with_suffix(".md").read_text("utf-8") == expected
    assert str(tmp_path) not in expected

    def interrupted(run):
        if len(asked) == SEARCHED + 5:
            raise KeyboardInterrupt
        return train(run)

    asked.clear()
    monkeypatch.setattr(script.training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.command.main([*WORDS, "--out", str(stopped)])
    rows = stopped / path.name
    assert len(rows.read_text("utf-8").splitlines()) == SEARCHED + 5
    rows.write_text(rows.read_text("utf-8")[:-20], "utf-8")  # killed while it wrote the last
    asked.clear()
    monkeypatch.setattr(script.training, "train", train)
    assert script.command.main([*WORDS, "--out", str(stopped)]) == expected
    assert len(asked) == JUDGED - 4
    assert sorted(rows.read_text("utf-8").splitlines()) == sorted(path.read_text("utf-8").splitlines())


ROW = {"key": "a", "start": 6.0, "end": 5.0, "losses": [5.5], "clipped": 0.5, "update_clipped": 0.0, "skipped": 0}


@pytest.mark.parametrize("line", [b"{", b"[]", b"1", b'{"clip": "none"}', b'{"key": "a"}', b"", b"\xff"])
def test_a_file_of_something_else_is_refused_and_left_alone(script, tmp_path, line) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW).encode(), line, b"half"]))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"no rows of a comparison, the first of them line 2\. Mend it"):
        script.rows.Comparison(path, "", 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("rest", "kept"), [("", 2), ('{"key": "c", "sta', 2), (json.dumps({**ROW, "key": "c"}), 3)])
def test_a_last_row_is_kept_where_it_is_whole(script, tmp_path, rest, kept) -> None:
    path, whole = tmp_path / "rows.jsonl", "".join(json.dumps({**ROW, "key": key}) + "\n" for key in "ab")
    path.write_text(whole + rest, "utf-8")
    assert len(script.rows.read_rows(path)) == kept
    assert path.read_text("utf-8") == whole + (f"{rest}\n" if kept == 3 else "")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_is_read_by_names_and_may_have_lost_losses(script, tmp_path) -> None:
    path, run = tmp_path / "rows.jsonl", run_of(script)
    written = script.rows.Comparison(path, "", 1)
    written._keep(script.training.Outcome(run, 6.0, None, [5.5, math.inf, math.nan], 0.5, 0.0, 20))
    (line,) = path.read_text("utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["losses"] == [5.5, None, None], "no JSON has a NaN"
    path.write_text(json.dumps(dict(reversed(json.loads(line).items()))) + "\n", "utf-8")
    read = script.rows.Comparison(path, "", 1)
    read.run([run])
    assert read.outcomes[run].losses == pytest.approx([5.5, math.nan, math.nan], nan_ok=True)
    assert (read.outcomes[run].clipped, read.outcomes[run].skipped) == (0.5, 20)


def test_what_has_begun_is_kept_where_another_run_fails(script, tmp_path, monkeypatch) -> None:
    """Two at a time: the second ends though the first fails, and the third is not begun."""
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(script.rows, "seconds_of", lambda name, steps: 1.0)
    runs = [run_of(script, clip="nothere*=1.0;*=adaptive"), *(run_of(script, seed=seed) for seed in (0, 1))]
    with pytest.raises(script.command.SpecError, match="nothere"):
        script.rows.Comparison(path, "", 2).run(runs)
    assert [json.loads(line)["run"]["seed"] for line in path.read_text("utf-8").splitlines()] == [0]


@pytest.fixture
def two_workers(tmp_path):
    """Starts the script in processes of its own, waits until both workers train, and gives it with its rows."""
    started = []

    def two_workers(steps: int):
        words = ["--task", "recurrent", "--lr", "0.004", "--clip", "adaptive", "--seeds", "2", "--data", "sound"]
        command = [sys.executable, str(ROOT / "scripts" / "compare_strategies.py"), *words]
        command += ["--steps", str(steps), "--out", str(tmp_path)]
        script = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
        )
        started.append(script)
        until(lambda: len(workers_of(script.pid)) == 2)
        workers = [psutil.Process(pid) for pid in workers_of(script.pid)]
        until(lambda: all(map(ignores_interrupts, workers)))
        return script, workers, tmp_path

    yield two_workers
    for script in started:
        script.kill()
        script.wait()


def test_no_worker_outlives_the_script(two_workers) -> None:
    script, workers, _ = two_workers(steps=100_000)
    script.kill()
    until(lambda: not any(is_alive(worker) for worker in workers))


def test_what_has_begun_is_kept_where_somebody_interrupts(two_workers) -> None:
    """Two of the four runs; the terminal interrupts workers too."""
    script, _, folder = two_workers(steps=100)
    os.killpg(script.pid, signal.SIGINT)
    script.wait(timeout=120)
    (path,) = folder.glob("*.jsonl")
    assert len(path.read_text("utf-8").splitlines()) == 2
    assert script.returncode != 0


def test_a_second_interrupt_drops_what_has_begun(two_workers) -> None:
    script, workers, _ = two_workers(steps=100_000)
    for _ in range(2):
        os.killpg(script.pid, signal.SIGINT)
        time.sleep(1)
    script.wait(timeout=60)
    until(lambda: not any(is_alive(worker) for worker in workers))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def ignores_interrupts(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text("ascii")
    return bool(int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1 << (signal.SIGINT - 1))


def workers_of(pid: int) -> list[int]:
    """The processes that train for the script, which started them."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            found += [child.pid] * ("spawn_main" in " ".join(child.cmdline()))
    return found


def until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("not within 60 seconds")


class TestRowsAreKept:
    """By what a run compares, and nothing else."""

    @pytest.fixture
    def trained(self, script, asked, tmp_path):
        """Trains what is missing, and says what that was."""

        def trained(*more: str):
            asked.clear()
            script.command.main([*WORDS, "--out", str(tmp_path), *more])
            return [(run.clip, run.data) for run in asked]

        assert len(trained()) == SEARCHED + JUDGED
        return trained

    @pytest.fixture
    def edit(self, script, monkeypatch):
        """Append to the source of a module."""

        def edit(module, text: str) -> None:
            source = script.keys.inspect.getsource
            changed = SimpleNamespace(getsource=lambda of: source(of) + (text if of is module else ""))
            monkeypatch.setattr(script.keys, "inspect", changed)
            script.keys.code_of.cache_clear()

        return edit

    def test_after_a_change_elsewhere(self, script, trained, edit, monkeypatch) -> None:
        facts = script.command.circumstances
        monkeypatch.setattr(script.command, "circumstances", lambda *given: {**facts(*given), "commit": "other-dirty"})
        edit(importlib.import_module("hf_gradclip.strategies.agc"), "\nclass Another: ...\n")
        assert trained() == []
        edit(zclip, '\n"""Words."""\n# and more of them\n')
        assert trained() == []
        edit(importlib.import_module("hf_gradclip.strategies.global_norm"), "\n# what no outlier is\n")
        assert trained("--workers", "2") == []

    def test_from_before_norms_were_looked_at(self, script, trained, tmp_path) -> None:
        (path,) = tmp_path.glob("*.jsonl")
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            del row["norm"], row["rise"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        assert trained() == []
        (table,) = tmp_path.glob("*.md")
        assert "| `zclip` | 5.003 | 25.0% | - | - |" in table.read_text("utf-8")

    def test_not_after_a_change_of_the_strategy(self, trained, edit) -> None:
        edit(zclip, "\nclass Another: ...\n")
        assert sorted(trained()) == sorted(2 * [("zclip", data) for data in ("sound", "loud", "tensor")])
        assert trained() == []

    def test_not_with_other_fields(self, trained) -> None:
        changed = ["--clip", "zclip:warmup_steps=7", "global_norm:max_norm=1"]
        assert {clip for clip, _ in trained(*changed)} == {"zclip:warmup_steps=7"}
        default = ["--clip", "zclip", "global_norm:max_norm=1.0,norm_type=2"]
        assert trained(*default) == [], "the same fields in other words"

    def test_not_after_a_change_of_a_task(self, script, trained, edit) -> None:
        edit(script.smollm2, "\nclass Another: ...\n")
        assert trained() == [], "another kind of task"
        edit(script.scratch, "\nclass Another: ...\n")
        assert len(trained()) == SEARCHED + JUDGED

    def test_not_after_a_change_of_what_is_a_head_where_a_strategy_leaves_heads_alone(self, trained, edit) -> None:
        trained("--clip", "agc")
        edit(importlib.import_module("hf_gradclip.views.heads"), "\nclass Another: ...\n")
        assert {clip for clip, _ in trained("--clip", "agc", "zclip")} == {"agc"}

    def test_not_after_a_change_of_what_finds_names_where_there_are_groups(self, trained, edit) -> None:
        trained("--clip", "*=zclip")
        edit(importlib.import_module("hf_gradclip.patterns"), "\nclass Another: ...\n")
        assert {clip for clip, _ in trained("--clip", "*=zclip", "zclip")} == {"*=zclip"}

    def test_not_after_a_change_of_a_module_that_makes_its_data(self, trained, edit) -> None:
        words = ("--task", "sentences", "recurrent", "--lr", "0.004")
        trained(*words)
        edit(importlib.import_module("manual_chats"), "\nclass Another: ...\n")
        assert len(trained(*words)) == JUDGED

    def test_not_after_a_change_of_the_rule_for_outliers_where_a_strategy_goes_by_it(self, trained, edit) -> None:
        edit(importlib.import_module("hf_gradclip.outlier"), "\nclass Another: ...\n")
        assert {clip for clip, _ in trained()} == {"zclip"}

    def test_not_with_other_settings(self, script, trained, monkeypatch) -> None:
        assert {data for _, data in trained("--data", "noise")} == {"noise"}
        assert len(trained("--steps", "199")) == SEARCHED + JUDGED
        assert len(trained("--seeds", "3")) == JUDGED // 2
        assert len(trained("--beta2", "0.95")) == SEARCHED + JUDGED
        assert len(trained("--weight_decay", "1")) == SEARCHED + JUDGED
        monkeypatch.setitem(script.training.FAULTS, "tensor", 999.0)
        assert {data for _, data in trained()} == {"tensor"}
        monkeypatch.setattr(script.training, "BROKEN", 0.04)
        assert {data for _, data in trained()} == {"tensor", "loud"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--clip zclp", "--clip zclp: clip='zclp': no strategy or preset is called 'zclp'. Did you mean zclip?"),
        ("--clip none/zclp", "Did you mean zclip?"),
        ("--clip none/agc", "--clip none/agc: ClipConfig(update=agc): it goes by units"),
        ("--task decodr", "invalid choice: 'decodr'"),
        ("--seeds 11", "invalid choice: 11"),
        ("--steps 0", "--steps 0: must be at least 1."),
        ("--steps -3", "--steps -3: must be at least 1."),
        ("--steps 10", "--steps 10: none of so few is broken with loud, tensor. Give more, or --data sound."),
        ("--workers 0", "--workers 0: must be at least 1."),
        ("--lr 0", "--lr 0.0: must be above 0 and finite."),
        ("--lr nan", "--lr nan: must be above 0 and finite."),
        ("--own_rates --lr 0.1", "--own_rates searches for rates, and --lr 0.1 gives one. Leave one of them out."),
        ("--first_seed -1", "--first_seed -1: must be from 0 to 998; rates are chosen on (1000, 1001)."),
        ("--first_seed 999", "--first_seed 999: must be from 0 to 998"),
        ("--beta2 1", "--beta2 1.0: must be at least 0 and below 1."),
        ("--weight_decay -1", "--weight_decay -1.0: must be at least 0 and finite."),
        ("--optimizer momentum --beta2 0.9", "are AdamW's. Leave them out with momentum."),
        (
            "--clip global_norm:max_norm=1.0 1.0",
            "--clip 1.0: is global_norm:max_norm=1.0 again. Leave one of them out.",
        ),
        ("--clip zclip none/none", "--clip none/none: is none again. Leave one of them out."),
        ("--clip nothere*=1.0;*=adaptive", "There are embed.weight, layers.weight_ih_l0, layers.weight_hh_l0."),
        ("--clip none/nothere*=zclip;*=zclip", "There are embed.weight, layers.weight_ih_l0, layers.weight_hh_l0."),
        ("--against zclp", "--against zclp: "),
        ("--against agc", "--against agc: not among --clip, which is none zclip global_norm:max_norm=1."),
        ("--name a/b", "--name a/b: must be a name without a folder; the folder is --out."),
        (f"--out {__file__}", "is a file. Give a folder."),
    ],
)
def test_what_cannot_run_as_asked_is_refused_before_anything_runs(script, asked, capsys, words, said) -> None:
    with pytest.raises(SystemExit):
        script.command.main([*WORDS, *words.split()])
    assert said in " ".join(capsys.readouterr().err.split())
    assert asked == []


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(script, asked) -> None:
    with pytest.raises(SystemExit, match=r"cannot be written to .* Give another folder or --name"):
        script.command.main([*WORDS, "--out", f"{__file__}/below"])
    assert asked == []


def test_a_whole_configuration_is_refused_before_anything_runs(script, asked, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.yaml").write_text("{gradient: zclip, nonfinite: skip}", "utf-8")
    with pytest.raises(SystemExit):
        script.command.main([*WORDS, "--clip", "whole.yaml"])
    assert "--clip whole.yaml: is a whole configuration. Give a spec" in capsys.readouterr().err
    assert asked == []


def test_a_short_run_on_sound_data_is_not_refused(script, asked) -> None:
    """None of 10 steps is to be broken then; and `level` breaks the half of any run."""
    script.command.main([*WORDS, "--lr", "0.004", "--steps", "10", "--data", "sound"])
    script.command.main([*WORDS, "--lr", "0.004", "--steps", "10", "--data", "level"])
    assert {run.data for run in asked} == {"sound", "level"}


def test_a_package_that_is_missing_is_said_before_anything_runs(script, asked, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(script.command, "missing", script.tasks.missing)
    monkeypatch.setitem(script.tasks.NEEDS, "lora", ("torch", "no-such-package"))
    monkeypatch.setattr(script.command, "find_spec", lambda name: None)
    for words, said in (
        ("--task lora", "pip install no-such-package"),
        (f"--out {tmp_path}", "pip install matplotlib"),
    ):
        with pytest.raises(SystemExit):
            script.command.main([*WORDS, *words.split()])
        assert capsys.readouterr().err.endswith(f": {said}\n")
    assert asked == []


def test_a_comparison_from_end_to_end(script, tmp_path, monkeypatch) -> None:
    """Two ways of clipping, two seeds, 20 steps: trained, kept, and the table has the differences of the rows."""
    words = ["--task", "decoder", "--clip", "adaptive", "--data", "loud", "--seeds", "2", "--steps", "20"]
    words += ["--lr", "0.004", "--workers", "1", "--name", "smoke"]
    for name, task in script.tasks.TASKS.items():
        monkeypatch.setitem(script.tasks.TASKS, name, replace(task, evaluated=32, batch_size=2))
    text = script.command.main([*words, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("compare_smoke_*.jsonl")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    ends = {(row["run"]["clip"], row["run"]["data"], row["run"]["seed"]): row["end"] for row in rows}
    assert len(rows) == len(ends) == 8
    assert all(end < row["start"] for end, row in zip(ends.values(), rows, strict=True))
    assert all((row["clipped"] > 0) == (row["run"]["clip"] == "adaptive") for row in rows)
    assert not {ends["adaptive", "sound", seed] for seed in (0, 1)} & {ends["none", "sound", seed] for seed in (0, 1)}
    a, b = (ends["adaptive", "sound", seed] - ends["none", "sound", seed] for seed in (0, 1))
    mean, reach = (a + b) / 2, 12.706 * abs(a - b) / 2  # t of one degree of freedom; the deviation is |a - b| / sqrt 2
    table = [cells(line) for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in table] == ["`none`", "`adaptive`"]
    assert table[1][5] == f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"{path.stem}_decoder_{kind}.png" for kind in ("curves", "intervals")
    }


class TestPictures:
    """Of two ways of clipping whose outcomes are made up."""

    @pytest.fixture
    def found(self, script):
        found = script.rows.Comparison(None, "", 1)
        ends = {("none", "sound"): (3.0, 5.0), ("zclip", "sound"): (1.0, 4.0)}
        ends |= {("none", "loud"): (None, 6.0), ("zclip", "loud"): (2.0, 4.5)}
        for (clip, data), by_seed in ends.items():
            for seed, end in enumerate(by_seed):
                run = run_of(script, clip=clip, data=data, seed=seed, steps=40)
                found.outcomes[run] = script.training.Outcome(run, 20.0, end, [9.0, 7.0, 5.0, end or 9], 0.0, 0.0, 0)
        return found

    @pytest.fixture(autouse=True)
    def four_means(self, script, monkeypatch) -> None:
        monkeypatch.setattr(script.training, "MEANS", 4)
        monkeypatch.setattr(script.pictures, "MEANS", 4)

    def test_curves(self, script, found) -> None:
        plain = run_of(script, seed=0, steps=40)
        sound, loud = script.pictures.curves(found, arms_of(plain, ("none", "zclip")), ("sound", "loud"), 1).axes
        lines = {line.get_label(): line for line in loud.get_lines()}
        assert lines["zclip"].get_xdata().tolist() == [5, 15, 25, 35], "of stretches of ten steps the middles"
        assert lines["zclip"].get_ydata().tolist() == [9, 7, 5, 4.5]
        assert set(lines["broken"].get_xdata()) == script.training.broken_steps(replace(plain, data="loud", seed=1))
        assert {line.get_label() for line in sound.get_lines()} == {"none", "zclip"}

    def test_a_run_that_is_lost_does_not_flatten_the_others(self, script, found) -> None:
        """The others' losses, 4.5 to 9 of a start of 20, are where they would be without it."""
        plain = run_of(script, seed=0, steps=40)
        arms, kinds = arms_of(plain, ("none", "zclip")), ("sound", "loud")
        lost = replace(plain, clip="none", data="loud", seed=1)
        found.outcomes[lost] = replace(found.outcomes[lost], losses=[9.0, 1e9, math.nan])
        for panel in script.pictures.curves(found, arms, kinds, 1).axes:
            low, high = panel.get_ylim()
            assert 0 <= low < 4.5 < 9 < high <= 1.15 * found.outcomes[plain].start

    def test_intervals(self, script, found) -> None:
        """Against the same clip on sound data: +1 and +0.5, t = 12.7062; without a clip one of two learnt nothing."""
        plain = run_of(script, seed=0, steps=40)
        arms = arms_of(plain, ("none", "zclip"))
        sound, loud = script.pictures.intervals(found, arms, ("sound", "loud"), (0, 1)).axes
        (bar,) = loud.containers
        assert bar.lines[0].get_xdata().tolist() == [0.75]
        (ends,) = bar.lines[2][0].get_segments()
        assert ends[:, 0].tolist() == pytest.approx([0.75 - 12.7062 * 0.25, 0.75 + 12.7062 * 0.25])
        assert [text.get_text() for text in loud.texts] == ["learnt nothing in 1 of 2"]
        assert [bar.lines[0].get_xdata().tolist() for bar in sound.containers] == [[-1.5]], "`none` less itself is 0"
        assert [bar.lines[0].get_ydata().tolist() for bar in sound.containers] == [[1]], "beside its name"

    def test_a_run_that_stopped_ends_where_it_stopped(self, script, found) -> None:
        """After 25 of 40 steps: two stretches of ten, and a half."""
        losses = script.training.stretches(range(25), 40)
        assert [len(part) for part in losses] == [10, 10, 5]
        run = run_of(script, clip="zclip", data="loud", seed=1, steps=40)
        found.outcomes[run] = replace(found.outcomes[run], losses=[9.0, 9.5, 9.9], end=None)
        _, loud = script.pictures.curves(
            found, arms_of(replace(run, data="sound"), ("zclip",)), ("sound", "loud"), 1
        ).axes
        assert loud.get_lines()[0].get_xdata().tolist() == [5, 15, 25]

    def test_a_row_with_fewer_means_is_of_the_whole_run(self, script, found) -> None:
        run = run_of(script, clip="zclip", data="loud", seed=1, steps=40)
        found.outcomes[run] = replace(found.outcomes[run], losses=[9.0, 8.0])
        _, loud = script.pictures.curves(
            found, arms_of(replace(run, data="sound"), ("zclip",)), ("sound", "loud"), 1
        ).axes
        assert loud.get_lines()[0].get_xdata().tolist() == [10, 30]

    @pytest.mark.parametrize("start", [20.0, None])
    def test_what_is_marked_is_in_the_legend(self, script, found, start) -> None:
        """Wherever its panel is; and a loss that is not finite at the start is no limit of the axis."""
        plain = run_of(script, clip="none", seed=0, steps=40)
        for run, outcome in list(found.outcomes.items()):
            found.outcomes[run] = replace(outcome, start=start)
            found.outcomes[level] = replace(outcome, run=(level := replace(run, data="level")))
        figure = script.pictures.curves(found, arms_of(plain, ("none", "zclip")), ("sound", "loud", "level"), 0)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["none", "zclip", "broken", "all broken"]
        figure.savefig(io.BytesIO())
