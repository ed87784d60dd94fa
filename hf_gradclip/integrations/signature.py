"""What a Trainer with GradClipMixin takes, as `help`, notebooks and editors show it: the Trainer's own, and `clip`."""

from __future__ import annotations

import inspect


def signature_of(cls: type, mixin: type) -> inspect.Signature:
    """The arguments of a class.

    Args:
        cls: has the mixin among its bases.
        mixin: whose `__init__` takes `clip` and hands on all else.
    """
    mro = cls.__mro__
    owners = [base for base in mro if "__init__" in vars(base)]
    mine = owners[0] is mixin
    _, *found = inspect.signature(vars(owners[1 if mine else 0])["__init__"]).parameters.values()
    if mine and all(parameter.name != "clip" for parameter in found):  # the other one's never gets there
        clip = inspect.Parameter("clip", inspect.Parameter.KEYWORD_ONLY, default=None)
        place = len(found) - (found[-1].kind is inspect.Parameter.VAR_KEYWORD if found else 0)
        found.insert(place, clip)
    return inspect.Signature(found)
