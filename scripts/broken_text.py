"""Text with broken documents in it, to see what clipping makes of them.

    python scripts/broken_text.py broken.jsonl
    accelerate launch scripts/finetune.py --clip adaptive --train_file broken.jsonl \\
        --train_sampling_strategy sequential --clip_record text --output_dir outputs/broken
    hf-gradclip report outputs/broken

The text is the source of Python's own standard library, in pieces. Four pieces hold one line, four hundred times, as a
crawl of the web may. The picture in the README is of that run.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from pathlib import Path

PIECE, BYTES = 3000, 1_040_000
BROKEN = ("}{" * 40 + "\n") * 400
PLACES = (0.30, 0.52, 0.71, 0.86)
"""Where the broken documents are, as shares of the text."""


def documents() -> list[str]:
    """The pieces in the order in which they are trained on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    pieces: list[str] = []
    for file in files:
        text = file.read_text("utf-8", "ignore")
        pieces += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        if len(pieces) * PIECE > BYTES:
            break
    sound = len(pieces)
    for place in PLACES:
        pieces.insert(int(sound * place), BROKEN)
    return pieces


def main(argv: list[str] | None = None) -> None:
    """Write the documents, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="Where to write.")
    file = parser.parse_args(argv).file
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()), "utf-8")


if __name__ == "__main__":
    main()
