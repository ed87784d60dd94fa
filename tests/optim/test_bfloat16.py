"""bfloat16 parameters without clipping: torch's fused arithmetic, which rounds once, in every language.

torch's foreach optimizers round after every operation; ours do not, see tests/optim/test_languages.py for the others.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gradclip import optim
from tests.kernels.languages import NAMES, serving
from tests.optim.sequence import LR, SHAPES, START, trained

FUSED = ["AdamW", "Adam"]
"""Those that torch has in a fused form for the CPU; its SGD moves no whole vector of bfloat16 there (2.13)."""


@pytest.mark.parametrize("language", NAMES)
@pytest.mark.parametrize("name", FUSED)
def test_bfloat16_without_clipping_is_torchs(name: str, language: str) -> None:
    with serving(language):
        ours, optimizer = trained(lambda params: getattr(optim, name)(params, lr=LR), torch.bfloat16)
    theirs, like = trained(lambda params: getattr(torch.optim, name)(params, lr=LR, fused=True), torch.bfloat16)
    for key in SHAPES:
        assert (ours[key] != START[key]).any()
        # the interpreter truncates where a GPU rounds, and 30 steps add that up
        rtol = 2**-7 if language != "Triton" else 2**-3
        np.testing.assert_allclose(ours[key], theirs[key], rtol=rtol, atol=0 if language != "Triton" else 2**-4)
    for mine, torchs in zip(optimizer.state.values(), like.state.values(), strict=True):
        assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in torchs.items()}
