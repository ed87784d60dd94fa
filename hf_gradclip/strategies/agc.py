"""Limit the gradient of each output of a layer relative to the weights that make it."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, Units, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class AGC(Strategy):
    """Scale the gradient of each unit by min(1, clip_factor * max(|w|, eps) / |g|), w and g being the unit's own.

    A unit is what makes one output: a row of nn.Linear, a token of nn.Embedding, a column of GPT-2's Conv1D, a channel
    of a convolution, a row of each expert where experts are fused into one tensor. The floor `eps` lets weights that
    start at zero leave it, if slowly. The limit is exact, without the 1e-6 that torch adds to a
    norm: the norm of a row may well be of that size.

    Parameters of one dimension (biases, the weights of norms) and the heads are left alone unless asked for; the start
    line of a run names the heads. A head is what the model says, by `get_output_embeddings()` or timm's
    `get_classifier()`, or else a layer with a usual name: lm_head, classifier, score, head, fc, ... (views/heads.py has
    the rule). Of a head of several layers it is the last one with a matrix. Where a head is tied to an embedding, both
    are left alone; where none is found, every other matrix is clipped. If what is left alone leaves nothing to clip,
    `agc` is refused.

    Args:
        clip_factor: the largest |g| as a multiple of |w|; > 0. The paper's best is 0.01 for large batches and up to
            0.16 for small ones.
        eps: the least |w| that counts; > 0.
        unit_axis: the axis of a matrix that counts its outputs: 0 for (out, in), 1 for (in, out); None goes by the
            kind of the layer.
        include_1d: clip parameters of one dimension too, each as one unit.
        include_head: clip the heads too.
        include_adapters: clip the weights of adapters (LoRA and its kin) too. The preset `adaptive` leaves them alone:
            one factor of a product may be as small as the other is large, so that a gradient relative to one of them
            says little, and LoRA's B starts at zero.

    Example:
        >>> preview(AGC(clip_factor=0.01), [[0.005, 0.5]], weights=2.0)
        [[0.005, 0.02]]

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021,
        arXiv 2102.06171.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    unit_axis: int | None = None
    include_1d: bool = False
    include_head: bool = False
    include_adapters: bool = True

    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "clip_factor", lambda v: v > 0, "must be > 0. The paper uses 0.01 to 0.16.")
        require(self, "eps", lambda v: v > 0, "must be > 0, else a weight of zero never moves. The paper uses 1e-3.")
        require(self, "unit_axis", lambda v: v in (None, 0, 1), "must be 0, 1 or none.")

    @property
    def needs(self) -> Needs:
        """Norms of units, and of their weights."""
        units = Units(self.unit_axis, self.include_1d, self.include_head, self.include_adapters)
        return Needs(units=units, weights=True)

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per unit."""
        whole_S = stats.layout.whole_S
        assert whole_S is not None
        assert stats.weight_sumsq_S is not None
        limit_S = stats.weight_sumsq_S.sqrt().clamp_(min=self.eps).mul_(self.clip_factor)  # in place: units are many
        scale_S = limit_S.div_(stats.norm_S).clamp_(max=1.0)
        return ClipPlan(scale_S.masked_fill_(whole_S, 1.0)), state
