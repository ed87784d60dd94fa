"""A plugin of Axolotl: `clip:` in its YAML file, for every Trainer that Axolotl makes, SFT and RL.

plugins:
  - hf_gradclip.integrations.axolotl.ClipPlugin
clip: adaptive
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field

from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.patch import patch
from hf_gradclip.say import logger
from hf_gradclip.strategy import SpecError

KEY = "clip"
DEFAULT = "adaptive"


class ClipArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML file, so that Axolotl's own check of the file lets it through."""

    clip: Any = Field(
        default=None, json_schema_extra={"description": "How hf_gradclip clips: a spec, a number or a configuration."}
    )


class ClipPlugin(BasePlugin):
    """Clips by `clip:`, and by `adaptive` where that is left out. `max_grad_norm` is overruled."""

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Check `clip:` as soon as the file is read, before a model or data are.

        Raises:
            SystemExit: for a wrong one, with one line that says what is wrong.
        """
        try:
            ClipConfig.parse(_spec_of(cfg))
        except SpecError as error:
            raise SystemExit(f"ClipPlugin: {error}") from None
        if _as_axolotls not in logger.filters:
            logger.filters.insert(0, _as_axolotls)

    def get_input_args(self) -> str:
        """The dotted path of ClipArgs."""
        return f"{ClipArgs.__module__}.{ClipArgs.__name__}"

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Patch the Trainer, before its training."""
        patch(trainer, clip=_spec_of(cfg))


def _as_axolotls(record: logging.LogRecord) -> bool:
    """Say the start and closing lines by a logger of Axolotl's, which drops what others say below WARNING."""
    if record.levelno >= logging.WARNING:
        return True
    record.name = f"axolotl.{record.name}"
    logging.getLogger(record.name).handle(record)
    return False


def _spec_of(cfg: Mapping[str, Any]) -> Any:
    """What `clip:` holds.

    Axolotl drops keys without a value once it has checked its file, so that null would be as good as nothing.
    """
    spec = cfg.get(KEY, DEFAULT)
    if spec is None:
        raise SpecError(
            "clip=null: to Axolotl this is the same as no clip, which means adaptive. Write none to measure only, a "
            "number to clip the norm to it, or leave the plugin out to clip by max_grad_norm."
        )
    return _plain(spec)


def _plain(value: Any) -> Any:
    """Axolotl's dicts, which hold None for every key, as dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
