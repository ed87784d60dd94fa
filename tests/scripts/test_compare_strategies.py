"""What differs between two runs of the comparison is how they clip: against loops of torch alone."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

from hf_gradclip.strategy import SpecError

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
    module = importlib.import_module("compare_strategies")
    monkeypatch.setattr(module, "RAMP", 0.3)
    yield module
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
        optimizer, lambda step: min((step + 1) / 3, 1) * 0.5 * (1 + math.cos(math.pi * step / run.steps))
    )
    drawn = torch.Generator().manual_seed(run.seed)
    losses = []
    for step in range(run.steps):
        chosen = torch.randint(256, len(data["labels"]), (task.batch_size,), generator=drawn)
        noise = task.noise(task.batch_size, drawn)
        broken = step in script.broken_steps(run)
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
    return losses


def test_what_is_broken(script) -> None:
    """A twentieth of the batches, after the warm-ups, elsewhere for another seed."""
    found = [script.broken_steps(run_of(script, steps=200, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert {len(steps) for steps in found} == {10}
    assert all(70 <= step < 200 for steps in found for step in steps)


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
    monkeypatch.setattr(script, "BROKEN", 0.4)
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
    """Of runs that began at 20."""
    found = script.Comparison(None, "", 1)
    plain = run_of(script, lr=0.0, seed=0)
    ends = {
        ("none", 1.0, "clean"): (3.0, 5.0),
        ("none", 2.0, "clean"): (6.0, 7.0),
        ("none", 3.0, "clean"): (6.0, 9.0),
        ("zclip", 1.0, "clean"): (9.0, 9.0),
        ("zclip", 2.0, "clean"): (2.0, 5.0),
        ("zclip", 3.0, "clean"): (2.0, 21.0),
        ("none", 1.0, "noise"): (4.0, 6.0),
        ("none", 1.0, "loud"): (None, 6.0),
        ("zclip", 1.0, "noise"): (10.0, 14.0),
        ("zclip", 1.0, "loud"): (9.0, 9.0),
    }
    for (clip, lr, data), by_seed in ends.items():
        for seed, end in enumerate(by_seed):
            run = run_of(script, clip=clip, lr=lr, data=data, seed=seed)
            found.outcomes[run] = script.Outcome(run, 20.0, None if end is None else end + 1, end, 0.25, 0.0, 0)
    rows = script.detail(found, plain, ("none", "zclip"), (1.0, 2.0, 3.0), (0, 1)).splitlines()[2:]
    lost = "no better than at the start in 1 of 2"
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["none", "4.000", "6.500", "7.500", "1 (edge)", "5.000", "+0.000 ± 0.000", "25%", "5.000", "-"],
        ["zclip", "9.000", "3.500", "-", "2", "4.500", "-0.500 ± 0.500", "25%", "+7.000 ± 1.000", f"none: {lost}"],
    ]
    assert script.paired([math.inf, 1.0], [1.0, 1.0]) == lost


WORDS = ["--task", "recurrent", "--clip", "zclip", "--seeds", "1", "--steps", "4"]


def test_an_interrupted_comparison_goes_on(script, monkeypatch, tmp_path, capsys) -> None:
    facts, commits = script.circumstances, iter(["one", "one", "other", "one-dirty", "one-dirty"])
    monkeypatch.setattr(script, "circumstances", lambda *given: {**facts(*given), "commit": next(commits)})
    monkeypatch.setattr(script, "RATES", {"adamw": (1e-3, 4e-3)})
    words = [*WORDS, "--workers", "1", "--out", str(tmp_path)]

    def trained() -> int:
        capsys.readouterr()
        script.main(words)
        return capsys.readouterr().err.count("Outcome(")

    first = script.main(words)
    (path,) = tmp_path.glob("compare_adamw_*.jsonl")
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 2 * (2 + 2)
    path.write_text("\n".join(lines[:-2])[:-20], "utf-8")  # killed while it wrote the sixth
    assert trained() == 3
    assert len(path.read_text("utf-8").splitlines()) == 8
    (table,) = tmp_path.glob("compare_adamw_*.md")
    assert table.read_text("utf-8") == first
    assert str(tmp_path) not in first
    assert [trained(), trained(), trained()] == [8, 8, 8]


def test_a_wrong_word_is_refused_before_anything_runs(script, capsys) -> None:
    with pytest.raises(SpecError, match="Did you mean zclip"):
        script.main([*WORDS, "--clip", "zclp"])
    assert "Outcome(" not in capsys.readouterr().err
