"""The table of addresses: uploaded where something changed, and never believed of memory that it does not describe."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels import table
from hf_gradclip.kernels.table import MisfitError, allocated, table_of
from tests.kernels.languages import KERNELS, OTHER, by
from tests.kernels.tensors import CPU, assert_same, assert_statistics, randn, wanted


@pytest.fixture
def uploads(monkeypatch) -> list[int]:
    """Grows by one for each; no table has been made before."""
    seen, upload = [], table.upload
    monkeypatch.setattr(table, "upload", lambda values, *to: seen.append(1) or upload(values, *to))
    monkeypatch.setattr(table, "_tables", OrderedDict())
    return seen


@by(*KERNELS)
class TestKept:
    def test_uploaded_only_when_changed(self, language, uploads):
        grads = [randn(100), None, randn(50, torch.bfloat16)]
        assert_statistics(language, grads)
        first = len(uploads)
        assert_statistics(language, grads)
        language.whole.apply_(grads, torch.tensor(0.5), None)
        assert len(uploads) == first
        grads[0] = randn(101)[1:]
        assert_statistics(language, grads)
        assert len(uploads) == first + 1

    def test_new_addresses_are_used(self, language):
        keep = []
        for seed in range(3):
            grads = [randn(1000, seed=seed), randn(3, OTHER[language.name], seed=seed)]
            keep += grads
            assert_statistics(language, grads)
            want = wanted(grads[0], torch.tensor(0.7))
            language.whole.apply_(grads, torch.tensor(0.7), None)
            assert_same(language, grads[0], want)

    def test_gradients_and_weights_have_a_place_each(self, language, monkeypatch):
        """Two sets of tensors of the same sizes: handed over once."""
        grads, weights = ([randn(300, seed=i + start) for i in range(3)] for start in (0, 9))
        first = [language.whole.statistics(some, torch.float64, CPU, False)[0] for some in (grads, weights)]
        monkeypatch.setattr(table, "upload", lambda *_: pytest.fail("uploaded"))
        again = [language.whole.statistics(some, torch.float64, CPU, False)[0] for some in (grads, weights)]
        assert all(map(torch.equal, first, again))
        assert not torch.equal(*first)

    def test_those_used_last_are_kept(self, language, uploads):
        """The first of three sets is used again before the third comes, and so it is the second that goes."""
        some = [[randn(300, seed=seed)] for seed in range(3)]
        for i in (0, 1, 0, 2, 0):
            assert_statistics(language, some[i])
        before = len(uploads)
        assert_statistics(language, some[0])
        assert_statistics(language, some[2])
        assert len(uploads) == before
        assert_statistics(language, some[1])
        assert len(uploads) == before + 1

    def test_a_gradient_goes_missing(self, language):
        grads = [randn(100), randn(50)]
        assert_statistics(language, grads)
        assert_statistics(language, [grads[0], None])
        assert_statistics(language, [None, grads[1]])

    def test_same_place_with_another_size_or_dtype(self, language):
        memory = randn(100)
        for grad in (memory, memory[:60], memory.view(torch.bfloat16)[:60].copy_(randn(60))):
            assert_statistics(language, [grad])

    def test_few_tables_are_kept(self, language, uploads, monkeypatch):
        monkeypatch.setattr(table, "TABLES", 3)
        for size in (1, 2, 3, 1, 4, 5, 1):
            assert_statistics(language, [randn(size)])
        assert [sizes[0] for _, _, _, _, sizes, _ in table._tables] == [(4,), (5,), (1,)]

    def test_another_order_of_the_elements_is_uploaded_once(self, language, uploads):
        grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        assert_statistics(language, [grad])
        first = len(uploads)
        assert_statistics(language, [grad])
        assert len(uploads) == first


def freed() -> Tensor:
    memory = torch.ones(8)
    part = memory[4:]  # whose address is not 0 afterwards
    memory.untyped_storage().resize_(0)
    return part


def too_small() -> Tensor:
    memory = torch.ones(8)
    memory.untyped_storage().resize_(4)
    return memory


REFUSED = {
    "torch.float64": torch.zeros(3, dtype=torch.float64),
    "torch.int32": torch.zeros(3, dtype=torch.int32),
    "contiguous": torch.zeros(6)[::2],
    "shape .* it must be contiguous": torch.zeros(1).expand(3),
    "meta": torch.zeros(3, device="meta"),
    "its storage was freed": freed(),
    "8 elements and no memory": too_small(),
}


@by(*KERNELS)
@pytest.mark.parametrize(("says", "grad"), REFUSED.items(), ids=REFUSED)
def test_refused(language, grad, says):
    with pytest.raises(MisfitError, match=f"gradient 1 .*{says}"):
        language.whole.statistics([None, grad], torch.float64, CPU, True)
    with pytest.raises(MisfitError, match=f"gradient 1 .*{says}"):
        language.whole.apply_([None, grad], torch.tensor(0.5), None)


@by(*KERNELS)
@pytest.mark.parametrize(("says", "strides"), [("contiguous", (2,)), ("contiguous", (0,))])
def test_refused_where_another_tensor_was_taken_before(language, says, strides):
    """The same address, size and dtype; of the second element on it is other memory, or none."""
    memory = torch.ones(6)
    language.whole.apply_([memory[:3]], torch.tensor(0.5), None)
    with pytest.raises(MisfitError, match=says):
        language.whole.apply_([memory.as_strided((3,), strides)], torch.tensor(0.5), None)
    assert memory.tolist() == [0.5] * 3 + [1.0] * 3


def test_columns_that_do_not_belong_together():
    a, square = torch.ones(6), torch.ones(2, 3)
    for other, says in (
        ([a], "columns of 2 and of 1 tensors"),
        ([a, torch.ones(5)], "tensor 1 has 5 elements beside 6"),
        ([a, square.t().contiguous().t()], "must have one order"),
    ):
        with pytest.raises(MisfitError, match=says):
            table_of([[a, square], other], CPU, 64, what="tensor")
    with pytest.raises(MisfitError, match="tensor 0 has 6 elements beside 0"):
        table_of([[None], [a]], CPU, 64, what="tensor")


def test_allocated():
    whole = torch.ones(4, 6)
    for fine in (whole, whole[1:, ::2], whole[3:, 5:], whole.t(), torch.ones(1).expand(9), torch.ones(0)):
        assert allocated(fine)
    assert not allocated(freed())
    assert not allocated(too_small())
    assert allocated(torch.ones(3, device="meta"))
