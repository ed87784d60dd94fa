"""The parts of gpu_check.py: each is a module that runs by itself, in a process and a time box of its own."""
