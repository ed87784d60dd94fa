"""The plugin of Axolotl, beside a stand-in for Axolotl: its `clip:` is checked early, and the Trainer is patched.

The real run is scripts/doors.py.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from typing import Any

import pytest
import torch
from pydantic import create_model
from transformers import PrinterCallback, Trainer

from hf_gradclip import GradClipMixin, GradClipTrainer
from hf_gradclip.say import announce, logger
from tests.tiny import counting_data, logged, tiny_llama, train, training_args, weights_of

CLIP = {"strategy": "zclip", "warmup_steps": 5, "z_threshold": 0.5}
MODULE = "hf_gradclip.integrations.axolotl"


class Default(dict):
    """As Axolotl's DictDefault: a key that is not there holds None."""

    def __missing__(self, key: str) -> None:
        return None


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, made as Axolotl makes it."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(logger, "filters", [])
    yield importlib.import_module(MODULE).ClipPlugin()
    sys.modules.pop(MODULE, None)


def trained(plugin: Any, cfg: Any, folder: Any, **changes: Any) -> Trainer:
    """A stock Trainer that the plugin has seen, after its training."""
    trainer = Trainer(model=tiny_llama(), args=training_args(str(folder), **changes), train_dataset=counting_data())
    plugin.register(cfg)
    plugin.post_trainer_create(cfg, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def test_it_trains_as_our_trainer_does(plugin, tmp_path):
    mine = trained(plugin, Default(clip=Default(CLIP)), tmp_path)
    ours = train(GradClipTrainer, clip=CLIP)
    rates = logged(mine, "clip/rate")
    assert 2 <= sum(rates) <= len(rates) - 2, "some steps clip and some do not"
    assert rates == logged(ours, "clip/rate")
    assert torch.equal(weights_of(mine.model), weights_of(ours.model))


@pytest.mark.parametrize(("cfg", "said"), [({}, "adaptive_norm"), ({"clip": "1e-3"}, "max_norm=0.001")])
def test_which_clip(plugin, tmp_path, cfg, said):
    trainer = trained(plugin, Default(cfg), tmp_path, max_steps=1)
    assert isinstance(trainer, GradClipMixin)
    assert said in str(trainer._clip_config)


def test_a_file(plugin, tmp_path):
    path = tmp_path / "its.yaml"
    path.write_text("strategy: zclip\nz_threshold: 0.5\n")
    assert "z_threshold=0.5" in str(trained(plugin, {"clip": str(path)}, tmp_path, max_steps=1)._clip_config)


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("adaptve", "clip='adaptve': no strategy or preset is called 'adaptve'. Did you mean adaptive?"),
        (-1, "must be > 0"),
        (Default(strategy="zclip", z=3), "zclip has no field 'z'"),
        ([1], "a list is no spec"),
        (None, "clip=null: to Axolotl this is the same as no clip"),
    ],
)
def test_a_wrong_clip_ends_axolotl_with_one_line(plugin, clip, words):
    with pytest.raises(SystemExit) as caught:
        plugin.register(Default(clip=clip))
    assert words in str(caught.value)
    assert str(caught.value).startswith("ClipPlugin: ")
    assert len(str(caught.value).splitlines()) == 1


def test_axolotls_own_check_of_its_file_keeps_the_key(plugin):
    """Axolotl makes a class below its own and that of every plugin, and goes on with what it dumps."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    own = create_model("Own", base_model=(str, "model"))
    below = create_model("Below", __base__=(own, getattr(importlib.import_module(module), name)))
    for clip in (1.5, "adaptive", {"gradient": {"strategy": "zclip"}, "update": None}):
        assert below(clip=clip).model_dump(exclude_none=True)["clip"] == clip
    assert "clip" not in below().model_dump(exclude_none=True)


def test_what_is_said_comes_from_a_logger_that_axolotl_lets_through(plugin, caplog):
    """Axolotl's loggers for others drop what is below WARNING."""
    logger.addFilter(lambda record: record.levelno >= logging.WARNING)
    plugin.register(Default())
    plugin.register(Default())
    announce("begun")
    logger.warning("odd")
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("axolotl.hf_gradclip", "begun"),
        ("hf_gradclip", "odd"),
    ]
