"""What differs between two runs of the comparison is how they clip: against loops of torch alone."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = 10
OPTIMIZERS = {
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    yield importlib.import_module("compare_strategies")
    torch.set_num_threads(threads)


def run_of(script, **fields):
    """A short run; fields win."""
    plain = {"task": "recurrent", "optimizer": "adamw", "clip": "none", "lr": 4e-3, "data": "clean", "seed": 3}
    return script.Run(**{**plain, "steps": STEPS, **fields})


def by_torch(script, run, max_norm=None, loud=1.0, noisy=False):
    """Loss half-way and at the end of the same run in a loop of torch; noise and loud losses for half of the steps."""
    task = script.TASKS[run.task]
    data = task.data()
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = OPTIMIZERS[run.optimizer](model.parameters(), run.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / run.steps))
    )
    drawn = torch.Generator().manual_seed(run.seed)
    seen, losses = [], []
    for step in range(run.steps):
        chosen = torch.randint(256, len(data["labels"]), (task.batch_size,), generator=drawn)
        noise = task.noise(task.batch_size, drawn)
        broken = float(torch.rand((), generator=drawn)) < 0.5 and step >= 2
        seen.append(broken)
        batch = noise if broken and noisy else {key: value[chosen] for key, value in data.items()}
        (model(**batch).loss * (loud if broken else 1.0)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step + 1 in (run.steps // 2, run.steps):
            model.eval()
            with torch.no_grad():
                losses.append(float(model(**{key: value[:256] for key, value in data.items()}).loss))
            model.train()
    assert 0 < sum(seen) < len(seen)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["recurrent", "encoder"])
def test_without_clipping_it_is_torch(script, task, optimizer) -> None:
    run = run_of(script, task=task, optimizer=optimizer, lr=min(script.RATES[optimizer]))
    outcome = script.train(run)
    assert [outcome.half, outcome.end] == pytest.approx(by_torch(script, run), rel=1e-5)
    assert outcome.clipped == outcome.update_clipped == outcome.skipped == 0


def test_clipping_is_what_it_says(script) -> None:
    run = run_of(script, task="decoder", optimizer="momentum", clip="global_norm:max_norm=1.5", lr=0.1)
    outcome = script.train(run)
    assert [outcome.half, outcome.end] == pytest.approx(by_torch(script, run, max_norm=1.5), rel=1e-5)
    assert outcome.end != pytest.approx(by_torch(script, run)[1], rel=1e-4)
    assert 0 < outcome.clipped < 1


@pytest.mark.parametrize(("data", "fault"), [("loud", {"loud": 100.0}), ("noise", {"noisy": True})])
def test_broken_data_is_what_it_says(script, monkeypatch, data, fault) -> None:
    monkeypatch.setattr(script, "BROKEN", 0.5)
    run = run_of(script, data=data)
    assert script.train(run).end == pytest.approx(by_torch(script, run, **fault)[1], rel=1e-5)
    assert script.train(run).end != pytest.approx(by_torch(script, run)[1], rel=1e-3)


def test_update_is_clipped_where_it_is_asked_for(script) -> None:
    outcome = script.train(run_of(script, optimizer="rmsprop", clip="none/value:max_value=1", lr=1e-3))
    assert outcome.clipped == 0 < outcome.update_clipped  # its first update is ten times too large


def test_a_loss_that_is_not_finite_is_no_number(script) -> None:
    outcome = script.train(run_of(script, task="decoder", optimizer="momentum", lr=1e30))
    assert outcome.half is None
    assert outcome.end is None
    stopped = script.train(run_of(script, task="decoder", optimizer="momentum", lr=1e30, clip="zclip", steps=60))
    assert stopped.end is None
    assert stopped.skipped == 20


def test_numbers_of_a_table(script) -> None:
    found = script.Comparison(None, "", 1)
    losses = {
        ("none", 1.0): (3.0, 5.0),
        ("none", 2.0): (6.0, 7.0),
        ("zclip", 1.0): (9.0, 9.0),
        ("zclip", 2.0): (2.0, 5.0),
    }
    plain = run_of(script, lr=0.0, seed=0)

    def add(clip, lr, data, ends):
        for seed, end in enumerate(ends):
            run = run_of(script, clip=clip, lr=lr, data=data, seed=seed)
            found.outcomes[run] = script.Outcome(run, None if end is None else end + 1, end, 0.25, 0.0, 0)

    for (clip, lr), ends in losses.items():
        add(clip, lr, "clean", ends)
    add("none", 1.0, "noise", (4.0, 6.0))
    add("none", 1.0, "loud", (None, 6.0))
    add("zclip", 1.0, "noise", (10.0, 12.0))
    add("zclip", 1.0, "loud", (9.0, 9.0))
    rows = script.detail(found, plain, ("none", "zclip"), (1.0, 2.0), (0, 1)).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["none", "4.000", "6.500", "1", "5.000", "+0.000 ± 0.000", "25%", "+1.000 ± 0.000", "diverged in 1 of 2"],
        ["zclip", "9.000", "3.500", "2", "4.500", "-0.500 ± 0.500", "25%", "+2.000 ± 1.000", "+0.000 ± 0.000"],
    ]


def test_an_interrupted_comparison_goes_on(script, tmp_path, capsys) -> None:
    words = ["--task", "recurrent", "--clip", "zclip", "--seeds", "1", "--steps", "4", "--out", str(tmp_path)]
    first = script.main(words)
    (rows,) = tmp_path.glob("compare_adamw_*.jsonl")
    lines = rows.read_text("utf-8").splitlines()
    assert len(lines) == 2 * (len(script.RATES["adamw"]) + 2)
    rows.write_text("".join(f"{line}\n" for line in lines[:-3]), "utf-8")
    capsys.readouterr()
    assert script.main(words) == first
    assert capsys.readouterr().err.count("Outcome(") == 3
    other = [json.dumps({**json.loads(line), "commit": "another"}) for line in lines]
    rows.write_text("".join(f"{line}\n" for line in other), "utf-8")
    script.main(words)
    assert capsys.readouterr().err.count("Outcome(") == len(lines)
    (table,) = tmp_path.glob("compare_adamw_*.md")
    assert table.read_text("utf-8") == first
    assert str(tmp_path) not in first
