"""What a Trainer uploads to the hub: its output_dir, but for the record of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi

from hf_gradclip.record.files import FOLDER
from hf_gradclip.run.wrapping import wrap_class

KEPT_BACK = (f"{FOLDER}/*", f"{FOLDER}.old*/*")
"""The record of a run, and those of earlier runs in the same folder, by their paths in it."""


@contextmanager
def without_record(trainer_module: Any) -> Iterator[None]:
    """While it lasts, uploads of a folder leave the record out.

    Args:
        trainer_module: `transformers.trainer`, of which earlier versions call the function `upload_folder`.
    """

    def upload(original: Any, *args: Any, **kwargs: Any) -> Any:
        ignored = kwargs.get("ignore_patterns") or []
        kwargs["ignore_patterns"] = [*([ignored] if isinstance(ignored, str) else ignored), *KEPT_BACK]
        return original(*args, **kwargs)

    undo = wrap_class(HfApi, "upload_folder", upload)
    function = getattr(trainer_module, "upload_folder", None)
    if function is not None:
        trainer_module.upload_folder = lambda *args, **kwargs: upload(function, *args, **kwargs)
    try:
        yield
    finally:
        undo()
        if function is not None:
            trainer_module.upload_folder = function
