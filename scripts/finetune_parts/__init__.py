"""The rooms of finetune.py: flags and command line, data, model, text samples, checkpoints, words for wrong input."""
