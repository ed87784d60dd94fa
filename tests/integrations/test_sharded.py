"""Sharded backends against one process on the same batches: every strategy, every backend, 2, 3 and 4 gloo ranks.

Each launch runs many scenarios. A row compares 8 steps: norms to 1e-6 relative, weights to 1e-6, the same tensors
clipped in the same steps; the reference has steps that clip and steps that do not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from hf_gradclip import Clipper
from tests.integrations import mesh_main, scenarios
from tests.integrations.ranks import Found, launch
from tests.integrations.scenarios import KINDS
from tests.integrations.sharded import RATE, STEPS, STRATEGIES, UPDATES, Model, one_process, one_process_update

GRAD = ("ddp", "fsdp2", "fsdp2_offload")
FLAT = ("fsdp1", "fsdp1_original_parameters")
BY_TENSOR = ("adagc", "agc")
ZERO = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module")
def on_grad(tmp_path_factory) -> Found:
    words = [f"{s}:{b}" for s in ("table", "engaged") for b in GRAD] + ["unhooked:fsdp2"]
    words += [f"{s}:{b}" for s in ("kinds", "collectives", "bf16", "skips") for b in ("ddp", "fsdp2")]
    words += ["resume:fsdp2", "poisoned:ddp", "updates:fsdp2", "folded:ddp", "folded:fsdp2"]
    words += ["lacking:ddp", "looked:fsdp2", "scaled:fsdp2", *(f"flat:{b}" for b in FLAT)]
    return launch(2, "sharded_main", tmp_path_factory.mktemp("grad"), *words)[0]


@pytest.fixture(scope="module")
def on_zero(tmp_path_factory) -> Found:
    words = [f"{s}:{b}" for s in ("table", "engaged") for b in ZERO] + ["unhooked:zero2"]
    scenarios = ("kinds", "collectives", "bf16", "skips", "resume", "updates")
    words += [f"{s}:{b}" for s in scenarios for b in ("zero2", "zero3")]
    words += ["variants:zero", "poisoned:zero2", "updates:zero2_offload", "updates:zero3_offload", "swap:zero2_offload"]
    words += [f"{s}:{b}" for s in ("accumulated", "noted") for b in ("zero2", "zero3")]
    return launch(2, "sharded_main", tmp_path_factory.mktemp("zero"), *words)[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    found = {word: one_process(spec) for word, spec in STRATEGIES.items()}
    free = one_process("none")
    for word, run in found.items():
        assert (run["weights"] - free["weights"]).abs().max() > 1e-4, "clipping matters"
        clipped = [rate > 0 for rate in run["rates"]]
        if word in BY_TENSOR:
            assert any(0 < rate < 1 for rate in run["rates"][2:]), "its scales differ between tensors"
            assert min(run["rates"][2:]) < 1
        else:
            assert any(clipped), word
            assert not all(clipped), word
    return found


@pytest.fixture(scope="module")
def update_reference() -> dict[str, Any]:
    found = {word: one_process_update(*case) for word, case in UPDATES.items()}
    for word, run in found.items():
        assert any(run["rates"][1:]), word
        assert run["rates"][0] == 0, "at a learning rate of 0 nothing moves"
        assert min(run["rates"][1:]) < 1, word
    return found


def assert_same_update(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["weights"] - expected["weights"]).abs().max() < 1e-6
    assert found["rates"] == expected["rates"]


def assert_poisoned(found: dict[str, Any]) -> None:
    seen, never = found["seen"], found["never seen"]
    assert torch.equal(seen["weights"], never["weights"])
    assert seen["counts"]["skipped"] == seen["counts"]["nonfinite"] == 3
    assert never["counts"]["skipped"] == 0
    assert 0 < seen["counts"]["clipped"] == never["counts"]["clipped"] < 47


def differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    norms, theirs = torch.tensor(found["norms"]), torch.tensor(expected["norms"])
    weights = (found["weights"] - expected["weights"]).abs().max().item()
    return ((norms - theirs).abs() / theirs).max().item(), weights


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    norm, weights = differences(found, expected)
    assert norm < 1e-6
    assert weights < 1e-6
    assert found["rates"] == expected["rates"]


@pytest.mark.dist
class TestGrad:
    @pytest.mark.parametrize("word", STRATEGIES)
    @pytest.mark.parametrize("name", GRAD)
    def test_equals_one_process(self, on_grad, reference, name, word) -> None:
        assert_same(on_grad[f"table:{name}"][word], reference[word])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_kinds_of_parameters(self, on_grad, name, kind) -> None:
        assert_same(on_grad[f"kinds:{name}"][kind], one_process(STRATEGIES["adagc"], kind))

    @pytest.mark.parametrize("word", UPDATES)
    def test_updates_equal_one_process(self, on_grad, update_reference, word) -> None:
        assert_same_update(on_grad["updates:fsdp2"][word], update_reference[word])

    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_a_fused_optimizer_takes_coefficient_and_flag(self, on_grad, name) -> None:
        runs = [on_grad[f"folded:{name}"][word] for word in ("plain", "folded", "unread")]
        for run in runs:
            assert run["kept"], "the NaN step moved nothing, no counter either"
            assert run["counts"]["clip/skipped"] == run["counts"]["clip/nonfinite"] == 1
            assert 0 < run["counts"]["clip/rate"] < 1
            assert (run["weights"] - runs[0]["weights"]).abs().max() < 1e-6

    def test_bad_batches_leave_no_trace(self, on_grad) -> None:
        assert_poisoned(on_grad["poisoned:ddp"])

    def test_the_table_fails_without_the_hook(self, on_grad, reference) -> None:
        assert (on_grad["unhooked:fsdp2"]["weights"] - reference["global_norm"]["weights"]).abs().max() > 1e-3

    @pytest.mark.parametrize("name", GRAD)
    def test_clipping_is_engaged(self, on_grad, name) -> None:
        assert on_grad[f"engaged:{name}"]["nothing"] <= 3 * 0.5e-12 * 10

    def test_collectives_added(self, on_grad) -> None:
        """Beside the same loop without any clip call: none under DDP, one under FSDP2, two with max_abs."""
        ddp, fsdp2 = on_grad["collectives:ddp"], on_grad["collectives:fsdp2"]
        assert ddp["global_norm"] - ddp["none"] == 0
        assert ddp["value"] - ddp["none"] == 0
        assert fsdp2["global_norm"] - fsdp2["none"] == 1
        assert fsdp2["value"] - fsdp2["none"] == 2
        assert ddp["agc"] - ddp["none"] == 0
        assert fsdp2["agc"] - fsdp2["none"] == 1
        assert ddp["update"] - ddp["none"] == 0
        assert fsdp2["update"] - fsdp2["none"] == 2

    def test_resume(self, on_grad) -> None:
        assert_resumed(on_grad, "fsdp2")

    def test_whole_weights_of_fsdp2_are_not_taken_for_new_ones(self, on_grad, reference) -> None:
        assert all(on_grad["looked:fsdp2"]["whole"]), "they were shown when the clip looked"
        assert_same(on_grad["looked:fsdp2"], reference["zclip"])

    def test_one_rank_without_a_saved_state_takes_that_of_the_other(self, on_grad) -> None:
        whole, lacking, without = (on_grad["lacking:ddp"][word] for word in ("whole", "lacking", "without"))
        assert not torch.equal(without["weights"], whole["weights"]), "the state decides something in these steps"
        assert lacking["rates"] == whole["rates"]
        assert lacking["norms"] == whole["norms"]
        assert lacking["agree"]
        assert torch.equal(lacking["weights"], whole["weights"])

    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_a_skipped_step_moves_nothing(self, on_grad, name) -> None:
        assert_skipped(on_grad, name)

    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_bf16(self, on_grad, reference, name) -> None:
        assert_bf16(on_grad, reference, name)

    @pytest.mark.parametrize("word", STRATEGIES)
    @pytest.mark.parametrize("name", FLAT)
    def test_fsdp1(self, on_grad, reference, name, word) -> None:
        """Strategies of the whole gradient equal one process; the others are refused. Only the whole is counted."""
        found = on_grad[f"flat:{name}"][word]
        if word in ("param_norm", *BY_TENSOR):
            assert f"{word} under FSDP1" in found
            assert "Use FSDP2" in found
            return
        norm, weights = differences(found, reference[word])
        assert norm < 1e-6
        assert weights < 1e-6
        assert [rate > 0 for rate in found["rates"]] == [rate > 0 for rate in reference[word]["rates"]]
        assert "FSDP1" in found["backend"]

    @pytest.mark.parametrize("word", ["zclip", "adagc"])
    def test_loss_scale(self, on_grad, reference, word) -> None:
        """Norms in true units, and an overflow on one rank leaves weights and state as they were on all."""
        run = on_grad["scaled:fsdp2"][word]
        assert_same(run, reference[word])
        assert any(run["rates"][5:]), "clipped after the overflow"
        overflow = run["overflow"]
        assert not math.isfinite(overflow["norm"])
        assert not overflow["moved"]
        assert overflow["state"], "strategy state bitwise equal"
        assert overflow["said"]
        assert overflow["scales"] == [2.0**20, 2.0**19]
        assert overflow["counts"]["clip/skipped"] == overflow["counts"]["clip/nonfinite"] == 1


@pytest.mark.deepspeed
@pytest.mark.dist
class TestZero:
    @pytest.mark.parametrize("word", STRATEGIES)
    @pytest.mark.parametrize("name", ZERO)
    def test_equals_one_process(self, on_zero, reference, name, word) -> None:
        found = on_zero[f"table:{name}"][word]
        assert_same(found, reference[word])
        parts = "2 part(s)" if name == "zero3" else "1 part(s)"
        assert parts in found["backend"], "zero3 is cut into sub-groups"

    @pytest.mark.parametrize(
        ("name", "word"), [(name, word) for name in ("zero2", "zero3") for word in scenarios.updates_on(name)]
    )
    def test_updates_equal_one_process(self, on_zero, update_reference, name, word) -> None:
        assert_same_update(on_zero[f"updates:{name}"][word], update_reference[word])

    @pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
    def test_updates_of_an_offloaded_optimizer(self, on_zero, update_reference, name) -> None:
        assert_same_update(on_zero[f"updates:{name}"]["groups block_rms"], update_reference["groups block_rms"])

    def test_our_optimizer_is_not_swapped_for_another(self, on_zero) -> None:
        said = on_zero["swap:zero2_offload"]
        assert "hf_gradclip.optim.SGD with offload_optimizer: Accelerate would put DeepSpeedCPUAdam" in said

    def test_bad_batches_leave_no_trace(self, on_zero) -> None:
        assert_poisoned(on_zero["poisoned:zero2"])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_kinds_of_parameters(self, on_zero, name, kind) -> None:
        expected = one_process(STRATEGIES["adagc"], kind)
        if (name, kind) == ("zero3", "unused"):
            # DeepSpeed 0.19.8 steps an unused parameter with the gradient of the step before. We measure what it steps
            # with, so the norms are true and the run differs from torch by DeepSpeed's doing.
            norm, _ = differences(on_zero["kinds:zero3"]["unused"], expected)
            assert 1e-4 < norm < 1e-2
            return
        assert_same(on_zero[f"kinds:{name}"][kind], expected)

    @pytest.mark.parametrize("variant", scenarios.VARIANTS)
    def test_variants_of_the_configuration(self, on_zero, reference, variant) -> None:
        found = on_zero["variants:zero"][variant]
        if "bf16" not in variant:
            assert_same(found, reference["adagc"])
        else:
            assert differences(found, on_zero["bf16:zero2"]["adagc"])[0] < 2e-2

    def test_the_table_fails_without_the_hook(self, on_zero, reference) -> None:
        assert (on_zero["unhooked:zero2"]["weights"] - reference["global_norm"]["weights"]).abs().max() > 1e-3

    @pytest.mark.parametrize("key", ["nothing", "0.0", "1.0", "auto"])
    @pytest.mark.parametrize("name", ZERO)
    def test_clipping_is_engaged_whatever_the_config_says(self, on_zero, name, key) -> None:
        assert on_zero[f"engaged:{name}"][key] <= 3 * 0.5e-12 * 10

    def test_collectives_added(self, on_zero) -> None:
        """DeepSpeed always reduces a norm; ours takes its place, so nothing is added, and one with max_abs."""
        for name in ("zero2", "zero3"):
            count = on_zero[f"collectives:{name}"]
            assert count["global_norm"] - count["none"] <= 0
            assert count["value"] - count["global_norm"] == 1
            assert count["agc"] - count["global_norm"] == 0
            assert count["update"] - count["global_norm"] == 1

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_a_clip_call_after_every_micro_batch(self, on_zero, name) -> None:
        """The norm of the last step until there is another, as DeepSpeed itself gives it; None before the first."""
        ours, stock = on_zero[f"accumulated:{name}"]["ours"], on_zero[f"accumulated:{name}"]["stock"]
        assert ours["norms"][0] is None
        assert ours["norms"][1:-1:2] == ours["norms"][2::2]
        assert ours["norms"][1::2] == pytest.approx(stock["norms"][1::2], rel=1e-5)
        assert 0 < sum(norm > 0.278 for norm in stock["norms"][1::2]) < 6, "some steps clip and some do not"
        assert (ours["weights"] - stock["weights"]).abs().max() < 1e-5

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_a_step_without_a_clip_call_is_recorded_whole(self, on_zero, name) -> None:
        found = on_zero[f"noted:{name}"]
        assert found["steps"].tolist() == list(range(1, STEPS + 1))
        assert found["record"] == pytest.approx(found["losses"], rel=1e-6)
        assert found["rates"] == pytest.approx(RATE, rel=1e-6)

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_resume(self, on_zero, name) -> None:
        assert_resumed(on_zero, name)

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_a_skipped_step_moves_nothing(self, on_zero, name) -> None:
        assert_skipped(on_zero, name)

    @pytest.mark.parametrize("name", ["zero2", "zero3"])
    def test_bf16(self, on_zero, reference, name) -> None:
        assert_bf16(on_zero, reference, name)

    def test_three_ranks(self, tmp_path, reference) -> None:
        """Shards that cut rows and tensors elsewhere, and a vocabulary that three does not divide."""
        found = launch(3, "sharded_main", tmp_path, "table:zero2", "table:zero3")[0]
        for name in ("zero2", "zero3"):
            for word, expected in reference.items():
                assert_same(found[f"table:{name}"][word], expected)


def assert_skipped(found: Found, name: str) -> None:
    for case in ("strategy sgd", "nan sgd", *(f"nan {kind}" for kind in scenarios.STEPPED)):
        run, word = found[f"skips:{name}"][case], case.split()[0]
        assert run["kept"], "moments and counters, bit for bit"
        assert run["moved"] == [True, True, False, True, True]
        assert run["said"] == [False, False, True, False, False]
        assert run["counts"]["clip/skipped"] == 1
        assert run["counts"]["clip/nonfinite"] == (word == "nan")
        assert (run["norms"][2] < 1) == (word == "strategy"), "the reported norm stays the true one"


def assert_resumed(found: Found, name: str) -> None:
    for word in ("zclip", "adagc", "update"):
        run = found[f"resume:{name}"][word]
        assert run["state"], "strategy state bitwise equal"
        assert run["norms"]
        assert run["weights"] == 0
        assert any(run["rates"][2:5]), "clipped before the stop, past the warm-up"
        assert any(run["rates"][5:]), "and after it"

        alone = Clipper.for_model(Model(), STRATEGIES["adagc" if word == "adagc" else "zclip"])
        assert alone.load_state_dict(run["saved"]) == "", "two ranks' state loads into one process"
        assert int(alone.state.seen) == 5


def assert_bf16(found: Found, reference: dict[str, Any], name: str) -> None:
    """A bf16 number has 8 bits, so a rounding is off by up to 2^-9 = 2e-3; a norm adds thousands of them.

    The same backend's own clip at the same limit sees the same gradients, so global_norm agrees with it to the rounding
    of one coefficient carried through 8 steps. Against the float32 run every strategy stays within a few roundings.
    """
    runs = found[f"bf16:{name}"]
    norm, weights = differences(runs["global_norm"], runs["stock"])
    assert norm < 2e-3
    assert weights < 2e-3
    for word, expected in reference.items():
        norm, weights = differences(runs[word], expected)
        assert 1e-6 < norm < 2e-2, "bf16 did run"
        assert weights < 2e-2


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.dist
def test_fp16_under_deepspeed(tmp_path, reference) -> None:
    """The norm is in true units, an overflow is DeepSpeed's own skip and is counted, and our step leaves the scale."""
    run = launch(2, "sharded_main", tmp_path, "fp16:zero2")[0]["fp16:zero2"]
    overflows = [norm == float("inf") for norm in run["norms"]]
    assert 0 < sum(overflows) < 6
    assert run["moved"] == [not overflow for overflow in overflows]
    first = overflows.index(False)
    assert run["norms"][first] == pytest.approx(reference["global_norm"]["norms"][0], rel=5e-3)
    assert len(set(run["scales"][first:])) == 1
    assert run["counts"]["skipped"] == run["counts"]["nonfinite"] == sum(overflows)
    assert run["counts"]["clipped"] > 0


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory) -> Found:
    return launch(4, "mesh_main", tmp_path_factory.mktemp("mesh"), *mesh_main.SCENARIOS)[0]


@functools.cache
def one_block(word: str) -> dict[str, Any]:
    found = mesh_main.fit(mesh_main.Block(), mesh_main.STRATEGIES[word])
    assert min(found["rates"]) < max(found["rates"]), word
    return found


@pytest.mark.dist
class TestMeshes:
    """HSDP, tensor parallel with plain parameters beside it, FSDP x TP, and FSDP1, on four ranks through Clipper.

    And sequence parallel under AdamW, which clips no gradient and must add them up itself.
    """

    @pytest.mark.parametrize("word", mesh_main.STRATEGIES)
    @pytest.mark.parametrize("layout", mesh_main.LAYOUTS)
    def test_equals_one_process(self, on_meshes, layout, word) -> None:
        assert_same(on_meshes[f"{layout} {word}"], one_block(word))

    @pytest.mark.parametrize("word", mesh_main.STRATEGIES)
    @pytest.mark.parametrize("layout", mesh_main.FLAT)
    def test_fsdp1(self, on_meshes, layout, word) -> None:
        flat = on_meshes[f"{layout} {word}"]
        if word not in mesh_main.WHOLE:
            assert f"{word} under FSDP1" in flat
            assert "Use FSDP2" in flat
            return
        norm, weights = differences(flat, one_block(word))
        assert norm < 1e-6
        assert weights < 1e-6
        assert [rate > 0 for rate in flat["rates"]] == [rate > 0 for rate in one_block(word)["rates"]]

    def test_replicas_that_differ_are_seen(self, on_meshes) -> None:
        same, changed = on_meshes["spreads"]["hsdp"]
        assert same == 0.0
        assert changed == pytest.approx(0.01 / 1.01, rel=1e-3), "a replica whose gradient is 1 % larger"
        assert on_meshes["spreads"]["tp"] == [None, None], "nothing that is reduced is held twice"

    def test_sequence_parallelism(self, on_meshes) -> None:
        free, limited = (mesh_main.unsettled(options) for options in mesh_main.UNSETTLED.values())
        assert (free - limited).abs().max() > 1e-3
        for word, expected in zip(mesh_main.UNSETTLED, (free, limited), strict=True):
            assert (on_meshes["unsettled"][word] - expected).abs().max() < 1e-6, word
