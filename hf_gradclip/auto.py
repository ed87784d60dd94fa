"""`import hf_gradclip.auto`, at the top of a script: what `hf-gradclip run` does, for this process.

Every Trainer that is made from now on, and every Accelerator that prepares an optimizer, clips as HF_GRADCLIP says:
a spec as `--clip` takes it, or a whole configuration in JSON; `adaptive` where it is not set. A wrong one is an error
here. If no step was clipped when the process ends, it is said; its exit status stays.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from hf_gradclip.launch import NOTHING
from hf_gradclip.on_path.hf_gradclip_imports import install
from hf_gradclip.run.environment import SEEN, clip_of_environment
from hf_gradclip.say import logger


def _say_at_the_end() -> None:
    """In the process that began, and not in those that it started: they tell it what they did."""
    folder, process = tempfile.mkdtemp(prefix="hf_gradclip_"), os.getpid()
    os.environ[SEEN] = os.path.join(folder, "seen")

    def end() -> None:
        if os.getpid() == process:
            if not Path(folder, "seen").exists():
                logger.warning("hf_gradclip.auto: %s", NOTHING)
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)


clip_of_environment()
install()
if SEEN not in os.environ:
    _say_at_the_end()
