"""Sharded backends against one process on the same batches: DDP and FSDP on 2 gloo ranks, meshes on 4.

test_sharded_zero.py does the same for ZeRO. Each launch runs many scenarios. A row compares 8 steps: norms to 1e-6
relative, weights to 1e-6, the same tensors clipped in the same steps; the reference has steps that clip and steps that
do not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from tests.integrations import mesh_main
from tests.integrations.compared import (
    assert_bf16,
    assert_poisoned,
    assert_resumed,
    assert_same,
    assert_same_update,
    assert_skipped,
    differences,
)
from tests.integrations.ranks import Found, launch
from tests.integrations.scenarios import FLAT_TOO, KINDS
from tests.integrations.sharded import ADAPTIVE, BY_TENSOR, OTHERS, STRATEGIES, UPDATES, one_process

GRAD = ("ddp", "fsdp2", "fsdp2_offload")
FLAT = ("fsdp1", "fsdp1_original_parameters")


@pytest.fixture(scope="module")
def on_grad(tmp_path_factory) -> Found:
    words = [f"{s}:{b}" for s in ("table", "engaged") for b in GRAD] + ["unhooked:fsdp2", "loud:ddp", "loud:fsdp2"]
    words += ["others:ddp", "others:fsdp2"]
    words += [f"{s}:{b}" for s in ("kinds", "collectives", "bf16", "skips") for b in ("ddp", "fsdp2")]
    words += ["resume:fsdp2", "poisoned:ddp", "updates:fsdp2", "folded:ddp", "folded:fsdp2"]
    words += ["lacking:ddp", "looked:fsdp2", "scaled:fsdp2", *(f"flat:{b}" for b in FLAT)]
    return launch(2, "sharded_main", tmp_path_factory.mktemp("grad"), *words)[0]


@pytest.mark.dist
class TestGrad:
    @pytest.mark.parametrize("word", STRATEGIES)
    @pytest.mark.parametrize("name", GRAD)
    def test_equals_one_process(self, on_grad, reference, name, word) -> None:
        assert_same(on_grad[f"table:{name}"][word], reference[word])

    @pytest.mark.parametrize("word", [*OTHERS, "enlarged taken"])
    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_others_equal_one_process(self, on_grad, others_reference, name, word) -> None:
        assert_same(on_grad[f"others:{name}"][word], others_reference[word.removesuffix(" taken")])

    @pytest.mark.parametrize("word", ADAPTIVE)
    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_adaptive_rules_equal_one_process(self, on_grad, loud_reference, name, word) -> None:
        assert_same(on_grad[f"loud:{name}"][word], loud_reference[word])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_kinds_of_parameters(self, on_grad, name, kind) -> None:
        clip, loud = KINDS[kind]
        expected = one_process(clip, kind, loud)
        assert_same(on_grad[f"kinds:{name}"][kind], expected)
        assert (expected["weights"] - one_process("none", kind, loud)["weights"]).abs().max() > 1e-4, "it clips"

    @pytest.mark.parametrize("word", UPDATES)
    def test_updates_equal_one_process(self, on_grad, update_reference, word) -> None:
        assert_same_update(on_grad["updates:fsdp2"][word], update_reference[word])

    @pytest.mark.parametrize("name", ["ddp", "fsdp2"])
    def test_a_fused_optimizer_takes_coefficient_and_flag(self, on_grad, name) -> None:
        runs = [on_grad[f"folded:{name}"][word] for word in ("plain", "folded", "unread", "taken", "taken unread")]
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
        assert ddp["adaptive"] - ddp["none"] == 0
        assert fsdp2["adaptive"] - fsdp2["none"] == 1
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

    @pytest.mark.parametrize("word", [*STRATEGIES, *FLAT_TOO])
    @pytest.mark.parametrize("name", FLAT)
    def test_fsdp1(self, on_grad, reference, others_reference, name, word) -> None:
        """Strategies of the whole gradient equal one process; the others are refused. Only the whole is counted."""
        found = on_grad[f"flat:{name}"][word]
        if word in ("param_norm", "normalize", *BY_TENSOR):
            assert ("groups of them cannot be told" if word == "groups" else f"{word} under FSDP1") in found
            assert "Use FSDP2" in found
            return
        expected = others_reference[word] if word in FLAT_TOO else reference[word]
        norm, weights = differences(found, expected)
        assert norm < 1e-6
        assert weights < 1e-6
        assert [rate > 0 for rate in found["rates"]] == [rate > 0 for rate in expected["rates"]]
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
            assert ("groups of them cannot be told" if word == "groups" else f"{word} under FSDP1") in flat
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
