"""scripts/heads.py on the models of transformers, whose heads it has by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_head_is_clipped_and_no_inner_layer_left_alone() -> None:
    words = ["scripts/heads.py", "--library", "transformers"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "For" in line or "Model" in line]
    assert [row[0].strip("| ") for row in rows if row[-1] != "right |"] == [], done.stdout + done.stderr
    assert len(rows) >= 25
    assert f"{len(rows)} models, 0 wrong" in done.stdout
    assert done.returncode == 0


def test_what_is_wrong_is_said_and_fails() -> None:
    words = (
        "import heads; heads.TRANSFORMERS = ((*heads.TRANSFORMERS[0][:2], ('bert.pooler',)),);"
        "raise SystemExit(heads.main(['--library', 'transformers']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=500
    )
    row = "| BertForSequenceClassification | classifier | bert.pooler is clipped; classifier is left alone |"
    assert row in done.stdout, done.stderr
    assert "1 models, 1 wrong" in done.stdout
    assert done.returncode == 1
