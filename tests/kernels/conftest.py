"""`language`: the kernels in C, in C with threads, in plain torch, and in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_gradclip.kernels.operations import Language
from tests.kernels.languages import WAYS, using


@pytest.fixture(params=WAYS)
def language(request: pytest.FixtureRequest) -> Iterator[Language]:
    with using(request.param) as found:
        yield found
