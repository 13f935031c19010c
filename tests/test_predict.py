"""`predict` builds the fewest rows, and they give the answer of all rows."""

import itertools
import weakref

import numpy as np
import pytest
import torch

from csd_exp.errors import InputError
from csd_exp.priors.analytic import GaussianMixture
from csd_exp.priors.base import Cond, Query, compositional, predict, row_count

TEXTS = {"": [1.0, 1.0], "red": [0.1, 2.0], "blue": [3.0, 0.2]}


class Counting(GaussianMixture):
    """The analytic prior, noting how many rows each network call had."""

    def __init__(self, **settings):
        super().__init__(prompts=TEXTS, image_std=0.5, **settings)
        self.calls = []

    def eps(self, x_t, t, conds):
        assert len(x_t) == len(t) == len(conds)
        self.calls.append(len(x_t))
        return super().eps(x_t, t, conds)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def csd_edit_queries(prior, views: int = 3, source: str = "", negative: str = "", image: bool = True):
    x_t, source_t, condition = (normal(i, views, 3, 4, 4) for i in range(3))
    conditions = condition if image else [None] * views
    target = [prior.guidance("red", c, negative) for c in conditions]
    baseline = [prior.guidance(source, c, negative) for c in conditions]
    return [Query(x_t, 300, target), Query(source_t, 300, baseline)], conditions


def all_rows(prior, x_t, t, prompt, negative, conditions, w_y, w_s):
    """Every row of Eq. 3 evaluated, and every weight applied, also where it is zero."""
    out = []
    for x, image in zip(x_t, conditions, strict=True):
        words, null = (torch.tensor(TEXTS[p], dtype=torch.float64) for p in (prompt, negative))

        def eps(text, image, x=x):
            return GaussianMixture.eps(prior, x[None], torch.tensor([t]), [Cond(text=text, image=image)])[0]

        full, picture, nothing = eps(words, image), eps(null, image), eps(null, None)
        out.append(nothing + w_s * (picture - nothing) + w_y * (full - picture))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("w_y", "w_s", "source", "negative", "rows"),
    [
        (7.5, 5.0, "", "", 5),
        (7.3, 1.1, "blue", "blue", 5),
        (5.0, 5.0, "", "", 4),
        (7.3, 7.3, "", "", 4),
        (7.5, 1.0, "", "", 3),
        (7.3, 1.0, "", "", 3),
        (1.0, 1.0, "", "", 2),
        (7.5, 5.0, "blue", "", 6),
        (7.5, 5.0, "", "blue", 6),
    ],
)
def test_rows_of_a_csd_edit_view_and_their_answer(w_y, w_s, source, negative, rows):
    prior = Counting(guidance_scale=w_y, image_guidance_scale=w_s)
    queries, conditions = csd_edit_queries(prior, source=source, negative=negative)
    answers = predict(prior, queries)
    assert sum(prior.calls) == row_count(queries) == 3 * rows
    for query, answer, prompt in zip(queries, answers, ["red", source], strict=True):
        expected = all_rows(prior, query.x_t, 300, prompt, negative, conditions, w_y, w_s)
        torch.testing.assert_close(answer, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("w_y", "rows"), [(7.5, 3), (1.0, 2), (0.0, 2)])
def test_rows_without_an_image_condition(w_y, rows):
    prior = Counting(guidance_scale=w_y)
    queries, _ = csd_edit_queries(prior, image=False)
    target, baseline = predict(prior, queries)
    assert sum(prior.calls) == row_count(queries) == 3 * rows
    words = torch.tensor(TEXTS["red"], dtype=torch.float64)
    t = torch.full((3,), 300)
    eps = [GaussianMixture.eps(prior, queries[0].x_t, t, [Cond(text=text)] * 3) for text in (None, words)]
    torch.testing.assert_close(target, eps[0] + w_y * (eps[1] - eps[0]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(baseline, GaussianMixture.eps(prior, queries[1].x_t, t, [Cond()] * 3))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 15, 64])
def test_the_chunk_size_changes_nothing(chunk):
    whole = Counting(guidance_scale=7.5, image_guidance_scale=5.0, row_chunk=1000)
    chunked = Counting(guidance_scale=7.5, image_guidance_scale=5.0, row_chunk=chunk)
    queries, _ = csd_edit_queries(whole)
    for one, other in zip(predict(whole, queries), predict(chunked, queries), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    assert whole.calls == [15]
    assert max(chunked.calls) <= chunk
    assert len(chunked.calls) == -(-15 // chunk)
    assert max(chunked.calls) - min(chunked.calls) <= 1


SHORT = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    MemoryError(),
)


class Small(Counting):
    """Has memory for `room` rows at once, and notes which of the rows that did not fit are still held."""

    def __init__(self, room, error, **settings):
        super().__init__(**settings)
        self.room, self.error, self.refused = room, error, []

    def eps(self, x_t, t, conds):
        assert [one() for one in self.refused] == [None] * len(self.refused)
        if len(x_t) > self.room:
            self.refused.append(weakref.ref(x_t))
            raise type(self.error)(*self.error.args)
        return super().eps(x_t, t, conds)


@pytest.mark.parametrize("error", SHORT, ids=lambda e: type(e).__name__)
def test_rows_that_do_not_fit_are_halved_and_the_answer_is_the_same(error, capsys):
    settings = {"guidance_scale": 7.5, "image_guidance_scale": 5.0}
    small = Small(3, error, row_chunk=12, **settings)
    queries, _ = csd_edit_queries(small)
    wanted = predict(Counting(**settings), queries)
    for _ in range(2):  # the second step knows
        for one, other in zip(predict(small, queries), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    assert small.calls == [*[2] * 7, 1] * 2
    assert (small.row_chunk, len(small.refused)) == (2, 2)
    assert capsys.readouterr().err == "".join(
        f"csd: {rows} rows at once do not fit in the memory of cpu; from here on prior.row_chunk is "
        f"{rows // 2}, and the result the same.\n"
        for rows in (8, 4)
    )


def test_where_not_one_row_fits_it_is_said_in_one_sentence():
    small = Small(0, SHORT[0], row_chunk=2)
    queries, _ = csd_edit_queries(small)
    with pytest.raises(InputError, match=r"Not one row .* memory of cpu \(CUDA out of .*prior\.offload=true"):
        predict(small, queries)


def test_any_other_error_of_a_network_is_no_matter_of_memory():
    small = Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    queries, _ = csd_edit_queries(small)
    with pytest.raises(RuntimeError, match="mat1"):
        predict(small, queries)
    assert (small.row_chunk, len(small.refused)) == (64, 1)


def test_the_order_of_views_and_queries_is_restored():
    prior = Counting(guidance_scale=7.5, image_guidance_scale=5.0, row_chunk=4)
    queries, _ = csd_edit_queries(prior, views=4)
    answers = predict(prior, queries)
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 5):
        shuffled = [Query(q.x_t[list(order)], q.t, [q.guidance[i] for i in order]) for q in reversed(queries)]
        for answer, other in zip(reversed(answers), predict(prior, shuffled), strict=True):
            torch.testing.assert_close(other, answer[list(order)], rtol=1e-13, atol=1e-13)


def test_conditions_are_known_by_their_tensors_never_by_values():
    prior, image, text = Counting(), normal(0, 3, 4, 4), torch.tensor([1.0, 2.0])
    one = Cond(text=text, image=image)
    x_t = normal(1, 2, 3, 4, 4)
    others = [{"text": text.clone()}, {"image": image.clone()}, {"image": None}, {"text": None}]
    for other in (Cond(**{"text": text, "image": image} | changed) for changed in others):
        assert row_count([Query(x_t, 5, [[(1.0, one), (2.0, other)]] * 2)]) == 4
    same = [Query(x_t, 5, [[(1.0, one), (2.0, Cond(text=text, image=image))]] * 2)]
    assert row_count(same) == 2
    expected = 3 * GaussianMixture.eps(prior, x_t, torch.tensor([5, 5]), [one] * 2)
    torch.testing.assert_close(predict(prior, same)[0], expected)


def test_one_condition_in_two_views_or_two_queries_is_a_row_for_each():
    prior, cond = Counting(), Cond()
    x_t = normal(0, 2, 3, 4, 4)
    first, second = predict(
        prior, [Query(x_t, 10, [[(1.0, cond)]] * 2), Query(x_t, 900, [[(1.0, cond)]] * 2)]
    )
    assert prior.calls == [4]
    for answer, t in ((first, 10), (second, 900)):
        torch.testing.assert_close(answer, GaussianMixture.eps(prior, x_t, torch.tensor([t, t]), [cond] * 2))


def test_weights_that_cancel_cost_no_row_and_give_zero():
    prior, cond = Counting(), Cond()
    query = Query(normal(0, 1, 3, 4, 4), 10, [[(1.5, cond), (-1.5, cond)]])
    assert (predict(prior, [query])[0] == 0).all()
    assert prior.calls == []


def test_conditions_hold_any_named_tensors_and_rows_merge_on_all_of_them():
    text, pooled, control = (normal(i, 3) for i in range(3))
    one = Cond(text=text, pooled=pooled, control=control)
    assert one["control"] is control
    assert (one["image"], Cond(text=None)["text"]) == (None, None)
    x_t = normal(3, 1, 3, 4, 4)
    for other, rows in (
        (Cond(control=control, pooled=pooled, text=text), 1),
        (Cond(text=text, pooled=pooled, control=control, image=None), 1),
        (Cond(text=text, pooled=pooled.clone(), control=control), 2),
        (Cond(text=text, pooled=control, control=pooled), 2),
        (Cond(text=text, pooled=pooled), 2),
    ):
        assert row_count([Query(x_t, 5, [[(1.0, one), (2.0, other)]])]) == rows


def test_clean_views_are_estimated_beside_noise():
    prior = Counting(guidance_scale=7.5, image_guidance_scale=5.0, row_chunk=4)
    (query, other), _ = csd_edit_queries(prior)
    eps, clean, rest = predict(prior, [query, Query(query.x_t, 300, query.guidance, clean=True), other])
    bar = float(prior.alphas_cumprod[300])
    torch.testing.assert_close(bar**0.5 * clean + (1 - bar) ** 0.5 * eps, query.x_t)
    torch.testing.assert_close(rest, predict(prior, [other])[0])
    assert max(prior.calls) <= 4


@pytest.mark.parametrize(("image", "rows"), [(True, 2 + 2), (False, 1 + 2)])
def test_prompts_of_one_view_share_every_row_but_their_own(image, rows):
    prior, condition = Counting(guidance_scale=7.5, image_guidance_scale=5.0), normal(0, 3, 4, 4)
    condition = condition if image else None
    x_t = normal(1, 1, 3, 4, 4)

    def answer(guidance):
        return predict(prior, [Query(x_t, 300, [guidance])])[0]

    parts = {prompt: answer(prior.guidance(prompt, condition, "")) for prompt in ("red", "blue")}
    prior.calls.clear()
    prompts = [(0.2, "red"), (0.5, "blue"), (0.3, "red")]
    whole = answer(compositional(prior, prompts, condition, ""))
    assert sum(prior.calls) == rows
    torch.testing.assert_close(whole, 0.5 * parts["red"] + 0.5 * parts["blue"], rtol=1e-11, atol=1e-11)
