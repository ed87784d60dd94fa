"""What gpu_check.py prints last: all parts in few words. A device tool keeps the last 12,000 characters of a reply."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gpu_parts.worker import number, shown

LIMIT = 11_500
TIMED = re.compile(
    r": (torch clip_grad_norm_|clip (none|global_norm|zclip|adagc|adaptive)|torch clip \+ fused AdamW"
    r"|clip zclip \+ torch fused AdamW|optim.AdamW clip=zclip(, update=block_rms)?)$"
)

Line = dict[str, Any]
Found = dict[str, Any]
"""`commit`, `rehearsal`, and `parts`: by name their status, seconds, lines and, where not ok, what was printed last."""


def rows(found: Found, part: str) -> list[Line]:
    """The measurements of a part."""
    return [line for line in found["parts"].get(part, {}).get("lines", []) if "row" in line]


def failed(found: Found) -> list[str]:
    """The parts that did not end well, and the rows that were not measured; a part without time is none."""
    bad = [name for name, part in found["parts"].items() if part["status"] not in ("ok", "time box", "no time left")]
    return bad + [f"{name}: {line['row']}" for name in found["parts"] for line in rows(found, name) if "FAILED" in line]


def summary(found: Found) -> str:
    """Every line, for check.txt."""
    text = [_title(found)]
    for name, part in found["parts"].items():
        text += [f"\n## {name}: {part['status']}, {part['seconds']} s", *(f"  {shown(line)}" for line in part["lines"])]
    return "\n".join(text) + "\n"


def headline(found: Found) -> str:
    """What failed, and the numbers that matter, in at most LIMIT characters."""
    text = [_title(found), ", ".join(f"{name} {part['status']}" for name, part in found["parts"].items())]
    text += [f"  {name} said last: {part['said']}" for name, part in found["parts"].items() if part.get("said")]
    for name in found["parts"]:
        text += [f"  FAILED {name}: {line['row'][-66:]}: {line['FAILED'][:160]}" for line in _bad(found, name)[:12]]
    for name in ("env", "pytest"):
        lines = found["parts"].get(name, {}).get("lines", [])
        text += [f"  {shown(line)[:170]}" for line in lines if "FAILED" not in line]
    text += [*_counts(found), *_timings(found), *_share(found), *_bench(found), *_job(found), *_sweep(found)]
    text += [f"  {shown(line)[:200]}" for line in rows(found, "ncu")[:10]]
    whole = "\n".join(text) + "\n"
    return whole if len(whole) <= LIMIT else whole[: LIMIT - 40] + "\n... the rest is in check.txt\n"


def _title(found: Found) -> str:
    return f"hf_gradclip {found['commit']} on a GPU" + (" (REHEARSAL ON A CPU)" if found["rehearsal"] else "")


def _bad(found: Found, part: str) -> list[Line]:
    return [line for line in rows(found, part) if "FAILED" in line]


def _good(found: Found, part: str) -> list[Line]:
    return [line for line in rows(found, part) if "FAILED" not in line]


def _cells(line: Line, keys: Iterable[str]) -> str:
    return " / ".join(f"{value:.3g}" if isinstance(value := line.get(key, ""), float) else str(value) for key in keys)


def _counts(found: Found) -> list[str]:
    lines = _good(found, "counts")
    text = ["counts, 400 tensors: waits / kernels / copies / device us"] if lines else []
    for line in lines:
        keys = ("waits", "aten_ops") if "aten_ops" in line else ("waits", "kernels", "copies", "device_us")
        cells = f"{line['seconds']:.3g} s" if "seconds" in line else _cells(line, keys)
        text.append(f"  {line['row'][:56]:56s} {cells}{'  GIVEN UP' * bool(line.get('given_up'))}")
    return text


def _timings(found: Found) -> list[str]:
    lines = [line for line in _good(found, "timings") if TIMED.search(line["row"])]
    text = ["timings: ms from idle / ms behind a backlog / host ms / times the floor"] if lines else []
    for line in lines:
        name = line["row"].replace("nothing clips", "no").replace("clips:", "clip:").replace("llama", "")
        text.append(f"  {name[:56]:56s} {_cells(line, ('ms_idle', 'ms_behind', 'host_ms', 'x_floor'))}")
    return text


def _share(found: Found) -> list[str]:
    lines = _good(found, "share")
    text = ["share: step ms / clip ms / share / over no clipping"] if lines else []
    for line in lines:
        cells = f"{line['step_ms']:.4g} / {line['clip_ms']:.3g} / {line['share']:.2%} / {line['over_no_clipping']:+.2%}"
        text.append(f"  {line['row'][:40]:40s} {cells}")
    return text


def _bench(found: Found) -> list[str]:
    return [f"  {shown(line)[:110]}" for line in _good(found, "bench") if line["row"].startswith("bench_")]


def _job(found: Found) -> list[str]:
    text = []
    for line in _good(found, "job"):
        words = {key.rpartition("/")[2].replace("train_", ""): value for key, value in line.items() if value != ""}
        kept = (f"{key} {number(value)[:100]}" for key, value in words.items() if key not in ("row", "seconds"))
        text.append(f"  job {line['row'][:36]}: {'  '.join(kept)}")
    return text


def _sweep(found: Found) -> list[str]:
    lines = sorted(_good(found, "sweep"), key=lambda line: -line.get("TB_per_s", 0.0))
    text = []
    for kind in ("whole", "adam, bfloat16", "adam, float32"):
        mine = [line for line in lines if line["row"].startswith(kind)]
        text += [f"  {shown(line)[:140]}" for line in [*mine[:3], *(line for line in mine[3:] if line.get("now"))]]
    return text
