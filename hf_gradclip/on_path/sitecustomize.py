"""Imported by every Python that starts with this folder on its PYTHONPATH, where HF_GRADCLIP says how to clip.

The `sitecustomize` that would have been imported without this folder is run too.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

import hf_gradclip_imports

HERE = os.path.dirname(os.path.abspath(__file__))

if os.environ.get("HF_GRADCLIP"):
    hf_gradclip_imports.install()

others = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
if (spec := PathFinder.find_spec("sitecustomize", others)) is not None and spec.loader is not None:
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)
