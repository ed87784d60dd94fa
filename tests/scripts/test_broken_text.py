"""The text of the README's picture."""

from __future__ import annotations

import json

import pytest

from scripts.broken_text import BROKEN, main


def test_four_of_its_documents_are_broken(tmp_path) -> None:
    main([str(tmp_path / "text.jsonl")])
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text("utf-8").splitlines()]
    places = [i / len(texts) for i, text in enumerate(texts) if text == BROKEN]
    assert places == pytest.approx([0.3, 0.52, 0.71, 0.86], abs=0.015)
    assert 800_000 < sum(map(len, texts)) - 4 * len(BROKEN) < 1_200_000
