"""Plain parameters: every kind of `.grad` is clipped like its dense float64 equivalent, and not written in vain."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_gradclip import Clipper
from hf_gradclip.strategy import Needs
from hf_gradclip.views import UnsupportedBackendError, view_of
from tests.tiny import tiny_llama

MAX_NORM = 0.5
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.complex64: 1e-6}


def model_with(**grads: Tensor | None) -> nn.Module:
    """A parameter for each gradient; None stands for a parameter of 3 elements without one."""
    model = nn.Module()
    for name, grad in grads.items():
        like = torch.zeros(3) if grad is None else torch.zeros(grad.shape, dtype=grad.dtype)
        model.register_parameter(name, nn.Parameter(like))
        model.get_parameter(name).grad = grad
    return model


def wide(grad: Tensor) -> np.ndarray:
    """A dense copy in float64, complex numbers as pairs."""
    grad = grad.detach().to_dense() if grad.is_sparse else grad.detach()
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    return grad.double().numpy().copy()


def check(model: nn.Module) -> None:
    """`global_norm` on the model gives what numpy gives on the dense gradients."""
    before = {name: wide(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum((g**2).sum() for g in before.values()))
    assert norm > MAX_NORM
    got = Clipper.for_model(model, f"global_norm:max_norm={MAX_NORM}").step().item()
    assert got == pytest.approx(norm, rel=1e-6)
    for name, parameter in model.named_parameters():
        if name not in before:
            assert parameter.grad is None
            continue
        expected = before[name] * (MAX_NORM / (norm + 1e-6))
        rounding = ROUNDING[parameter.grad.dtype]
        np.testing.assert_allclose(wide(parameter.grad), expected, rtol=rounding, atol=1e-7 * rounding, err_msg=name)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class TestKinds:
    def test_missing_empty_and_0_d(self):
        check(model_with(a=random(3, 4), b=None, c=torch.zeros(0, 5), d=torch.tensor(-7.0)))

    def test_all_missing(self):
        clipper = Clipper.for_model(model_with(a=None, b=None), "global_norm:max_norm=1")
        assert clipper.step().item() == 0

    @pytest.mark.parametrize(
        "grad",
        [
            random(4, 6).t(),
            random(2, 3, 4, 5).permute(0, 2, 3, 1),
            random(2, 3, 4, 5).to(memory_format=torch.channels_last),
            random(4, 8)[:, ::2],
            random(10)[3:7],
            random(1, 5).expand(4, 5),
            random(1).expand(6),
        ],
        ids=["transposed", "permuted", "channels_last", "gaps", "slice", "expanded row", "expanded number"],
    )
    def test_not_contiguous(self, grad):
        check(model_with(a=grad, b=random(3)))

    def test_a_slice_leaves_its_neighbours_alone(self):
        base = torch.ones(10)
        check(model_with(a=base[3:7]))
        assert base.tolist() == [1, 1, 1, *base[3:7].tolist(), 1, 1, 1]
        assert base[3] < 1

    def test_sparse_with_duplicates(self):
        """Two entries for one row count as their sum."""
        grad = torch.sparse_coo_tensor(torch.tensor([[1, 5, 1]]), random(3, 4), (8, 4), check_invariants=True)
        assert not grad.is_coalesced()
        check(model_with(a=grad, b=random(3)))

    def test_sparse_from_an_embedding(self):
        model = nn.Embedding(20, 3, sparse=True)
        model(torch.tensor([1, 4, 4, 1, 19])).square().sum().backward()
        assert model.weight.grad.is_sparse
        check(model)
        assert model.weight.grad.is_sparse

    def test_sparse_without_entries(self):
        empty = torch.sparse_coo_tensor(
            torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4), (8, 4), check_invariants=True
        )
        check(model_with(a=empty, b=random(3)))

    def test_mixed_dtypes(self):
        check(
            model_with(
                a=random(30, 7),
                b=random(31, 7, dtype=torch.bfloat16),
                c=random(32, 7, dtype=torch.float16),
                d=random(33, 7, dtype=torch.float64),
                e=torch.complex(random(34), random(35)[:34]),
            )
        )

    def test_complex(self):
        check(
            model_with(a=torch.complex(random(4, 5), random(5, 4).t()), b=torch.complex(random(3, 4), random(3, 4)).t())
        )

    def test_value_bounds_every_kind(self):
        row = random(1, 5)
        sparse = torch.sparse_coo_tensor(torch.tensor([[1, 5, 1]]), random(3, 4), (8, 4), check_invariants=True)
        model = model_with(a=random(4, 6).t(), b=row.expand(4, 5), c=sparse, d=random(4, 8)[:, ::2])
        before = {name: wide(p.grad) for name, p in model.named_parameters()}
        Clipper.for_model(model, "value:max_value=0.3").step()
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(wide(parameter.grad), before[name].clip(-0.3, 0.3), rtol=1e-6, err_msg=name)

    def test_tied_parameters_count_once(self):
        model = nn.Module()
        model.embed = nn.Linear(4, 3, bias=False)
        model.head = nn.Linear(4, 3, bias=False)
        model.head.weight = model.embed.weight
        model.embed.weight.grad = random(3, 4)
        assert view_of(model).layout.names == ("embed.weight",)
        check(model)


class TestFrozen:
    def model(self) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].requires_grad_(False)
        return model

    def test_a_frozen_parameter_is_not_counted(self):
        model = self.model()
        model[0].weight.grad = torch.full((2, 2), 3.0)
        model[1].weight.grad = torch.full((2, 2), 100.0)
        assert Clipper.for_model(model, "global_norm:max_norm=1").step().item() == pytest.approx(6)
        assert (model[1].weight.grad == 100).all()

    def test_an_unfrozen_one_is_noticed_and_clipped(self, caplog):
        model = self.model()
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        with caplog.at_level(logging.WARNING, logger="hf_gradclip"):
            model[0].weight.grad = torch.full((2, 2), 3.0)
            clipper.step()
            assert caplog.messages == []
            model[1].requires_grad_(True)
            for _ in range(3):
                model[0].weight.grad = torch.full((2, 2), 3.0)
                model[1].weight.grad = torch.full((2, 2), 4.0)
                assert clipper.step().item() == pytest.approx(10)
                assert model[1].weight.grad.norm().item() == pytest.approx(0.8)
        assert len(caplog.messages) == 1
        assert "changed, from 1 to 2" in caplog.messages[0]
        assert "global_norm" in caplog.messages[0]

    def test_nothing_to_train_is_refused(self):
        with pytest.raises(ValueError, match="Linear has no trainable parameter"):
            Clipper.for_model(nn.Linear(2, 2).requires_grad_(False), "none")


class TestNotWritten:
    SPECS = ("none", "global_norm:max_norm=100", "param_norm:max_norm=100", "value:max_value=100", "zclip:max_norm=100")

    @pytest.mark.parametrize(
        "spec", [*SPECS, "adagc:max_norm=100", "autoclip", "global_norm:max_norm=100+zclip:max_norm=9"]
    )
    def test_a_step_that_clips_nothing_writes_nothing(self, spec):
        model = model_with(a=random(4, 6), b=random(4, 6).t(), c=random(3, dtype=torch.bfloat16))
        before = [(p.grad.data_ptr(), p.grad._version) for p in model.parameters()]
        Clipper.for_model(model, spec).step()
        assert [(p.grad.data_ptr(), p.grad._version) for p in model.parameters()] == before

    @pytest.mark.parametrize("spec", [spec.replace("100", "0.1") for spec in SPECS[1:]])
    def test_a_step_that_clips_writes_every_gradient_in_place(self, spec):
        model = model_with(a=random(4, 6), b=random(4, 6).t(), c=random(3, dtype=torch.bfloat16))
        before = [(p.grad.data_ptr(), p.grad._version) for p in model.parameters()]
        Clipper.for_model(model, spec).step()
        for parameter, (place, version) in zip(model.parameters(), before, strict=True):
            assert parameter.grad.data_ptr() == place
            assert parameter.grad._version > version

    def test_only_the_tensor_that_is_clipped_is_written(self):
        model = model_with(a=torch.ones(3), b=torch.ones(3) * 100)
        Clipper.for_model(model, "param_norm:max_norm=5").step()
        assert model.a.grad._version == 0
        assert model.b.grad._version == 1

    def test_pass_writes_nothing_on_a_nan_step(self):
        model = model_with(a=torch.tensor([1.0, math.nan]))
        Clipper.for_model(model, "global_norm:max_norm=0.1", nonfinite="pass").step()
        assert model.a.grad._version == 0


class TestNames:
    NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")

    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda model: model,
            torch.compile,
            nn.DataParallel,
            lambda model: nn.DataParallel(torch.compile(model)),
            lambda model: torch.compile(nn.DataParallel(model)),
        ],
        ids=["plain", "compile", "data parallel", "data parallel of compile", "compile of data parallel"],
    )
    def test_wrappers_put_no_prefix(self, wrap):
        model = self.model()
        view = view_of(wrap(model))
        assert view.layout.names == self.NAMES
        model[1].bias.grad = torch.tensor([3.0, 4.0])
        assert view.measure(Needs()).norm_S.tolist() == [0, 0, 0, 5]

    def test_wrappers_inside_put_no_prefix(self):
        model = self.model()
        model[0] = torch.compile(model[0])
        model[1] = checkpoint_wrapper(model[1])
        assert view_of(model).layout.names == self.NAMES

    def test_layout(self):
        layout = view_of(self.model()).layout
        assert layout.numel_S.tolist() == [6, 3, 6, 2]
        assert layout.param_S.tolist() == [0, 1, 2, 3]
        assert len(layout) == 4


def test_parts_that_nothing_marks_are_refused():
    """As transformers 5.3 loads them with tp_plan="auto": plain tensors, and `_tp_size` on the model."""
    model = nn.Sequential(tiny_llama())
    Clipper.for_model(model)
    model[0]._tp_size = 1
    Clipper.for_model(model)
    model[0]._tp_size = 2
    with pytest.raises(UnsupportedBackendError, match=r"LlamaForCausalLM .*tp_size=2.*plain tensors.*Use a version"):
        Clipper.for_model(model)
