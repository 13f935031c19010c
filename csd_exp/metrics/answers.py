"""Edits whose right answers are known exactly: how near a picture is to one, and whether its windows agree.

An ambiguous instruction ("tint it") has many right answers. Windows are judged one by one against the answer
that each has come nearest to, so that a picture of well edited windows that contradict each other is a strong
edit with a large disagreement, not a weak edit.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from csd_exp.answers.edits import EDITS, style_of
from csd_exp.errors import InputError
from csd_exp.metrics.base import MeanMetric
from csd_exp.metrics.windows import Embed, pixels, style_statistics, windows

Answer = Callable[[Tensor], Tensor]


class Fit(NamedTuple):
    """Edited windows against all K answers, in units of the embedding's root mean square.

    distance: [W, K] from window to answer. length: [W, K] from source to answer. along: [W, K], the part
    of a window's change that points to the answer, as a fraction of `length`. overlap: [W, K, K], inner
    products of the answers' changes.
    """

    distance: Tensor
    length: Tensor
    along: Tensor
    overlap: Tensor


class Answers:
    """The right answers to an instruction on a source picture, window by window.

    edit: the name of one of `csd_exp.answers.edits.EDITS`, or functions from a picture [3, H, W] in [0, 1] to
    its edit. side: of the non-overlapping windows, in pixels; None takes that of the prior's own windows.
    embed: what distances are taken between, windows [n, 3, side, side] to [n, D]; None takes the
    `style_statistics` of a painted edit and the `pixels` of any other. most: answers taken of an edit that
    has more, evenly spaced.
    Raises InputError, naming `edit`, for an unknown name or where painted answers lack their packages.
    """

    def __init__(
        self,
        edit: str | Sequence[Answer],
        side: int | None = 128,
        embed: Embed | None = None,
        most: int = 72,
    ):
        for name, value in (("side", side), ("most", most)):
            if value is not None and value < 1:
                raise InputError(f"metrics.answers.{name} must be at least 1, not {value}.")
        if isinstance(edit, str):
            if edit not in EDITS:
                raise InputError(f"edit must be one of {', '.join(EDITS)}, not {edit!r}.")
            known = EDITS[edit].answers
            edit = known[:: -(-len(known) // most)]
        painted = style_of(edit[0]) is not None
        self.functions, self.side = tuple(edit), side
        self.embed = embed or (style_statistics if painted else pixels)

    def pictures(self, source: Tensor) -> list[Tensor]:
        """Every answer on the whole picture, [3, H, W] in [0, 1] each."""
        return [self.picture(k, source) for k in range(len(self.functions))]

    def picture(self, k: int, source: Tensor) -> Tensor:
        """The answer k on the whole picture."""
        return _answered(self.functions[k], source)

    def side_on(self, source: Tensor, window: int | None = None) -> int:
        """The side of the windows in pixels, where the prior saw the source in windows of side `window`."""
        height, width = source.shape[-2:]
        return min(self.side or window or max(height, width), height, width)

    def fit(self, edited: Tensor, source: Tensor, window: int | None = None) -> Fit:
        """`edited` against every answer on `source`, both [3, H, W] in [0, 1].

        window: side in pixels of the prior's windows; None where it saw whole pictures.
        """
        side = self.side_on(source, window)
        start, changes, overlap = _changes(self.functions, self.embed, side, _Pixels(source))
        change = _embedded(self.embed, edited, side) - start
        # An answer may leave a window as it is.
        length2 = overlap.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
        inner = torch.einsum("wkd,wd->wk", changes, change).double()
        distance2 = length2 - 2 * inner + change.double().square().sum(1, keepdim=True)
        return Fit(distance2.clamp(min=0).sqrt(), length2.sqrt(), inner / length2, overlap)


class _Pixels:
    """A picture that equals any other with the same pixels."""

    def __init__(self, picture: Tensor):
        self.picture = picture.clone()

    def __hash__(self) -> int:
        return hash((self.picture.shape, self.picture.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pixels) and torch.equal(self.picture, other.picture)


# All metrics of a run, and the runs of a figure, ask for the same source again and again.
@lru_cache(maxsize=1)
def _changes(
    functions: tuple[Answer, ...], embed: Embed, side: int, source: _Pixels
) -> tuple[Tensor, Tensor, Tensor]:
    """The source's windows [W, D], each answer's change of them [W, K, D], and their inner products."""
    start = _embedded(embed, source.picture, side)
    answers = (_answered(function, source.picture) for function in functions)
    changes = torch.stack([_embedded(embed, answer, side) - start for answer in answers], 1)
    return start, changes, torch.stack([(c @ c.mT) for c in changes]).double()


def _embedded(embed: Embed, image: Tensor, side: int) -> Tensor:
    f = embed(windows(image, side))
    return f / f.shape[1] ** 0.5


def _answered(function: Answer, source: Tensor) -> Tensor:
    try:
        return function(source).clamp(0, 1)
    except ImportError as e:
        raise InputError(f"edit has painted answers, which need pip install 'csd_exp[train]' ({e}).") from e


class AnswerMetric(MeanMetric):
    """The mean over pictures of `value(fit)`; subclasses give the value.

    answers: the right ones to the edit.
    """

    def __init__(self, answers: Answers, **kwargs):
        super().__init__(**kwargs)
        self.answers = answers

    def update(self, edited: Tensor, source: Tensor, window: int | None = None) -> None:
        self.observe(self.value(self.answers.fit(edited, source, window)))

    def value(self, fit: Fit) -> Tensor:
        """The metric of one picture, a scalar."""
        raise NotImplementedError


class AnswerDistance(AnswerMetric):
    """mean_w min_k RMS(f(edited_w) - f(answer_k,w)): how far each window is from its nearest right answer.

    With `pixels` an RMSE in [0, 1]; 0 is an exact answer.
    """

    higher_is_better = False

    def value(self, fit: Fit) -> Tensor:
        return fit.distance.min(1).values.mean()


class EditStrength(AnswerMetric):
    """1 - sum_w |f(edited_w) - f(answer_{k_w},w)| / sum_w |f(source_w) - f(answer_{k_w},w)|, at most 1.

    How much of the way from the source to the right answers the windows have gone, each to the answer k_w
    for which that is most: 0 for the source, 1 for an exact answer, negative when moving away from all.
    """

    higher_is_better = True

    def value(self, fit: Fit) -> Tensor:
        nearest = (fit.distance / fit.length).argmin(1, keepdim=True)
        return 1 - fit.distance.gather(1, nearest).sum() / fit.length.gather(1, nearest).sum()


class AnswerDisagreement(AnswerMetric):
    """How different a window would be, as an RMS, had it got the edit that another window got.

    The change of window w is fitted by a part a_w >= 0 of its best-fitting answer k_w, by least squares.
    With c_k,w = f(answer_k,w) - f(source_w), the value is the root of the mean over w != v of
    |a_w c_{k_w},w - a_v c_{k_v},w|^2: both changes are taken on the same content, so content itself costs
    nothing. 0 where all windows got the same answer by the same amount, hence for the source and for every
    exact answer; with `pixels` in units of picture values. Compare it at equal strength: doing nothing
    agrees perfectly.
    """

    higher_is_better = False

    def value(self, fit: Fit) -> Tensor:
        _, length, along, overlap = fit
        count = len(along)
        if count == 1:
            return along.new_zeros(())
        amount, best = (along.clamp(min=0) * length).max(1)
        amount = amount / length.gather(1, best[:, None])[:, 0]
        # [w, v]: window w under the edit of window v.
        size = amount.square() * overlap.diagonal(dim1=1, dim2=2)[:, best]
        cross = overlap[torch.arange(count), best][:, best]
        own = size.diagonal()[:, None]
        apart = own + size - 2 * amount[:, None] * amount * cross
        return (apart.clamp(min=0).sum() / (count * (count - 1))).sqrt()
