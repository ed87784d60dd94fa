"""The folder that `hf-gradclip run` puts on PYTHONPATH. Its modules are imported by their bare names, without ours."""
