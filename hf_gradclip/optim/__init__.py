"""AdamW, Adam, RMSprop and SGD as in torch.optim, with `clip=` for the gradient and `update_clip=` for the update."""

from hf_gradclip.optim.adamw import Adam, AdamW
from hf_gradclip.optim.optimizer import ClippedOptimizer
from hf_gradclip.optim.rmsprop import RMSprop
from hf_gradclip.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "ClippedOptimizer", "RMSprop"]
