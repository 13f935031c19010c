"""Edits whose right answers are known exactly: how near a picture is to one, and whether its windows agree.

An ambiguous instruction ("tint it") has many right answers. Windows are judged one by one against the answer
that each has come nearest to, so that a picture of well edited windows that contradict each other is a strong
edit with a large disagreement, not a weak edit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csd_exp.answers.edits import EDITS
from csd_exp.errors import InputError
from csd_exp.metrics.base import PictureMetric
from csd_exp.metrics.windows import Embed, pixels, windows

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
    its edit. side: of the non-overlapping windows, in pixels. embed: what distances are taken between,
    windows [n, 3, side, side] to [n, D]: the `pixels` of a computed edit, the `style_statistics` of a
    painted one. most: answers taken of an edit that has more, evenly spaced.
    Raises InputError, naming `edit`, for an unknown name or where painted answers lack their packages.
    """

    def __init__(self, edit: str | Sequence[Answer], side: int = 128, embed: Embed = pixels, most: int = 72):
        if isinstance(edit, str):
            if edit not in EDITS:
                raise InputError(f"edit must be one of {', '.join(EDITS)}, not {edit!r}.")
            known = EDITS[edit].answers
            edit = known[:: -(-len(known) // most)]
        self.functions, self.side, self.embed = tuple(edit), side, embed
        self._source: Tensor | None = None

    def pictures(self, source: Tensor) -> list[Tensor]:
        """Every answer on the whole picture, [3, H, W] in [0, 1] each."""
        return [self._answer(function, source) for function in self.functions]

    def fit(self, edited: Tensor, source: Tensor) -> Fit:
        """`edited` against every answer on `source`, both [3, H, W] in [0, 1]."""
        start, changes, overlap = self._changes(source)
        change = self._embedded(edited) - start
        # An answer may leave a window as it is.
        length2 = overlap.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
        inner = torch.einsum("wkd,wd->wk", changes, change).double()
        distance2 = length2 - 2 * inner + change.double().square().sum(1, keepdim=True)
        return Fit(distance2.clamp(min=0).sqrt(), length2.sqrt(), inner / length2, overlap)

    def _changes(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The source's windows [W, D], each answer's change of them [W, K, D], and their inner products.

        Kept for the last source, as a run asks for the same one at every step.
        """
        if self._source is None or not torch.equal(self._source, source):
            start = self._embedded(source)
            changes = torch.stack(
                [self._embedded(self._answer(function, source)) - start for function in self.functions], 1
            )
            overlap = torch.stack([(c @ c.mT) for c in changes]).double()
            self._source, self._known = source.clone(), (start, changes, overlap)
        return self._known

    def _embedded(self, image: Tensor) -> Tensor:
        f = self.embed(windows(image, self.side))
        return f / f.shape[1] ** 0.5

    def _answer(self, function: Answer, source: Tensor) -> Tensor:
        try:
            return function(source).clamp(0, 1)
        except ImportError as e:
            raise InputError(
                f"edit has painted answers, which need pip install 'csd_exp[train]' ({e})."
            ) from e


class AnswerMetric(PictureMetric):
    """A metric that knows the right answers; see `Answers`."""

    def __init__(self, answers: Answers, **kwargs):
        super().__init__(**kwargs)
        self.answers = answers


class AnswerDistance(AnswerMetric):
    """mean_w min_k RMS(f(edited_w) - f(answer_k,w)): how far each window is from its nearest right answer.

    With `pixels` an RMSE in [0, 1]; 0 is an exact answer.
    """

    higher_is_better = False

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        return self.answers.fit(edited, source).distance.min(1).values.mean()


class EditStrength(AnswerMetric):
    """1 - sum_w |f(edited_w) - f(answer_{k_w},w)| / sum_w |f(source_w) - f(answer_{k_w},w)|, at most 1.

    How much of the way from the source to the right answers the windows have gone, each to the answer k_w
    for which that is most: 0 for the source, 1 for an exact answer, negative when moving away from all.
    """

    higher_is_better = True

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        fit = self.answers.fit(edited, source)
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

    def value(self, edited: Tensor, source: Tensor) -> Tensor:
        _, length, along, overlap = self.answers.fit(edited, source)
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
