"""Metrics of consecutive frames, on motion that is known."""

import cv2
import pytest
import torch
import torchvision
from torch import Tensor

from csd_exp.answers.photos import load, picture_files
from csd_exp.errors import InputError
from csd_exp.images import as_saved
from csd_exp.metrics import (
    DIS,
    RAFT,
    Drift,
    EfficientNetDistance,
    ExactWarpingError,
    FrameMetric,
    PerceptualConsistency,
    WarpingError,
    efficientnet_distance,
)
from csd_exp.metrics.flow import visible, warped

PANORAMA = next(file for file in picture_files("held_out") if file.stem == "pmndrs_park")


@pytest.fixture(scope="module")
def panorama() -> Tensor:
    return as_saved(load(PANORAMA, 128))


def pan(panorama: Tensor, *lefts: int, width: int = 160) -> list[Tensor]:
    """Frames of a camera that slides along: content moves to the left by the differences of `lefts`."""
    return [panorama[:, :96, left : left + width] for left in lefts]


def constant_flow(dx: float, dy: float, height: int, width: int) -> Tensor:
    return torch.tensor([dx, dy])[:, None, None].expand(2, height, width)


class Difference(FrameMetric):
    """The second mean colour minus the first."""

    def update(self, edited, source):
        self.follow(edited.mean())

    def between(self, previous, current):
        return current - previous


def test_frames_are_followed_in_order_and_forgotten_on_reset():
    metric = Difference()
    frames = [torch.full((3, 4, 4), level) for level in (0.1, 0.4, 0.2)]
    metric.update(frames[0], frames[0])
    assert metric.compute().isnan()  # one frame has no neighbour
    metric.update(frames[1], frames[1])
    assert float(metric.compute()) == pytest.approx(0.3)
    metric.update(frames[2], frames[2])
    assert float(metric.compute()) == pytest.approx((0.3 - 0.2) / 2)
    metric.reset()
    metric.update(frames[2], frames[2])
    assert metric.compute().isnan()


def test_calling_a_frame_metric_does_not_lose_the_frame_before():
    metric = Difference()
    for level in (0.1, 0.4, 0.2):
        metric(torch.full((3, 4, 4), level), torch.zeros(3, 4, 4))
    assert float(metric.compute()) == pytest.approx((0.3 - 0.2) / 2)


def test_warping_reads_where_the_flow_points_to():
    image = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(warped(image, torch.zeros(2, 3, 4))[0], image[0].double())
    # One pixel to the right; the last column stays at the border. Half a pixel down averages rows.
    assert warped(image, constant_flow(1, 0, 3, 4))[0, 1].tolist() == [5, 6, 7, 7]
    assert warped(image, constant_flow(0, 0.5, 3, 4))[0, 0].tolist() == [2, 3, 4, 5]


class TestVisible:
    """The forward-backward rule, pixel by pixel."""

    height, width = 6, 8

    def flow(self, dx, dy=0.0):
        return constant_flow(dx, dy, self.height, self.width).clone()

    def test_flow_that_comes_back_is_seen_but_for_what_leaves_the_picture(self):
        seen = visible(self.flow(2), self.flow(-2))
        assert seen[:, :6].all()
        assert not seen[:, 6:].any()
        seen = visible(self.flow(0, -1), self.flow(0, 1))
        assert seen[1:].all()
        assert not seen[0].any()

    def test_the_thresholds(self):
        # |2 - 1|^2 = 1 against 0.01 (4 + 1) + 0.5; |2 - 1.3|^2 = 0.49 against 0.01 (4 + 1.69) + 0.5.
        assert not visible(self.flow(2), self.flow(-1)).any()
        assert visible(self.flow(2), self.flow(-1.3))[:, :6].all()

    def test_motion_boundaries_are_left_out(self):
        there, back = self.flow(0), self.flow(0)
        there[0, :, 4:] = 0.5  # a step of 0.5 between columns 3 and 4: 0.25 > 0.002
        back[0, :, 4:] = -0.5
        seen = visible(there, back)
        assert not seen[:, 3].any()
        assert seen[:, [0, 1, 2, 4, 5, 6]].all()


class TestWarpingError:
    """A camera that moves 3 pixels a frame."""

    def test_exact_flow_of_an_exact_pan_is_free_and_flicker_is_what_it_costs(self, panorama):
        frames = pan(panorama, 0, 3, 6)
        there = constant_flow(-3, 0, 96, 160)
        flow = torch.stack([there, -there])
        exact = ExactWarpingError()
        for frame, known in zip(frames, [None, flow, flow], strict=True):
            exact.update(frame, frame, flow=known)
        assert float(exact.compute()) == pytest.approx(0, abs=1e-14)

        exact.reset()
        darker = [frame * 0.9 + level for frame, level in zip(frames, (0.0, 0.1, 0.0), strict=True)]
        for frame, source, known in zip(darker, frames, [None, flow, flow], strict=True):
            exact.update(frame, source, flow=known)
        assert float(exact.compute()) == pytest.approx(0.01, rel=1e-5)

    def test_the_sum_written_out(self, panorama):
        before, after = pan(panorama, 0, 3)
        after = after.flip(0)
        there = constant_flow(-3, 0, 96, 160)
        metric = ExactWarpingError()
        metric.update(before, before)
        metric.update(after, after, flow=torch.stack([there, -there]))
        # Columns 0 to 2 have left to the left.
        expected = (after[:, :, :-3] - before[:, :, 3:]).double().square().mean()
        assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)

    def test_without_known_flow_there_is_no_exact_error(self, panorama):
        exact = ExactWarpingError()
        for frame in pan(panorama, 0, 3):
            exact.update(frame, frame)
        assert exact.compute().isnan()

    def test_the_estimated_error_is_near_the_exact_one(self, panorama):
        frames = pan(panorama, 0, 3, 6)
        edited = [frame * 0.9 + level for frame, level in zip(frames, (0.0, 0.1, 0.0), strict=True)]
        estimated = WarpingError()
        for frame, source in zip(edited, frames, strict=True):
            estimated.update(frame, source)
        assert float(estimated.compute()) == pytest.approx(0.01, rel=0.1)

    def test_the_flow_is_that_of_the_sources(self, panorama):
        # Edited frames that stand still while the camera moves disagree along the camera's flow.
        frames = pan(panorama, 0, 3)
        still, moving = WarpingError(), WarpingError()
        for frame in frames:
            still.update(frames[0], frame)
            moving.update(frame, frame)
        assert float(still.compute()) > 10 * float(moving.compute())

    def test_frames_with_nothing_in_common_are_not_counted(self):
        class Gone:
            def __call__(self, a, b):
                return constant_flow(1000, 0, *a.shape[-2:])

        metric = WarpingError(Gone())
        for level in (0.2, 0.8):
            metric.update(torch.full((3, 8, 8), level), torch.zeros(3, 8, 8))
        assert metric.compute().isnan()


class TestDIS:
    def test_it_finds_a_shift_to_a_fraction_of_a_pixel(self, panorama):
        a, b = pan(panorama, 0, 3)
        flow = DIS()(a, b)
        assert flow.shape == (2, 96, 160)
        error = (flow - constant_flow(-3, 0, 96, 160)).norm(dim=0)[:, 8:]
        assert error.median() < 0.1

    def test_its_answer_does_not_depend_on_the_number_of_threads(self, panorama):
        a, b = pan(panorama, 0, 3)
        threads = cv2.getNumThreads()
        try:
            found = []
            for count in (1, 3):
                cv2.setNumThreads(count)
                found.append(DIS()(a, b))
                assert cv2.getNumThreads() == count
        finally:
            cv2.setNumThreads(threads)
        assert torch.equal(*found)

    @pytest.mark.parametrize("size", [(5, 7), (8, 8), (16, 30), (37, 53)])
    def test_small_pictures_have_a_flow_too(self, panorama, size):
        a, b = (frame[:, : size[0], : size[1]] for frame in pan(panorama, 0, 1))
        assert DIS()(a, b).shape == (2, *size)


class TestDrift:
    @pytest.mark.parametrize(("shift", "regraded"), [(0, False), (0, True), (3, False), (3, True)])
    def test_it_is_how_far_things_have_moved_whatever_their_colour(self, panorama, shift, regraded):
        source, edited = pan(panorama, 0, shift)
        metric = Drift()
        metric.update(as_saved(0.7 * edited + 0.15) if regraded else edited, source)
        assert float(metric.compute()) == pytest.approx(shift, abs=0.3)

    def test_where_nothing_is_in_both_pictures_it_has_no_value(self):
        metric = Drift(lambda a, b: constant_flow(1000, 0, *a.shape[-2:]))
        metric.update(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
        assert metric.compute().isnan()


class TestRAFT:
    def test_missing_weights_are_one_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(
            InputError, match=r"metrics/flow=raft needs .*raft_large_C_T_SKHT_V2.* metrics/flow=dis"
        ):
            RAFT()

    def test_the_network_sees_the_whole_picture_and_nothing_else_is_kept(
        self, panorama, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        torch.manual_seed(0)
        network = torchvision.models.optical_flow.raft_small()
        name = torchvision.models.optical_flow.Raft_Small_Weights.DEFAULT.url.rpartition("/")[2]
        (tmp_path / "hub/checkpoints").mkdir(parents=True)
        torch.save(network.state_dict(), tmp_path / "hub/checkpoints" / name)
        a, b = (frame[:, :90, :130] for frame in pan(panorama, 0, 3))
        flow = RAFT("small")(a, b)
        assert flow.shape == (2, 90, 130)
        padded = [torch.nn.functional.pad(x[None] * 2 - 1, [0, 6, 0, 38], mode="replicate") for x in (a, b)]
        with torch.no_grad():
            expected = network.eval()(*padded)[-1][0, :, :90, :130]
        assert torch.allclose(flow, expected, atol=1e-4)


def test_perceptual_consistency_is_the_mean_distance_of_neighbours(panorama):
    a, b, c = pan(panorama, 0, 2, 80)
    metric = PerceptualConsistency(EfficientNetDistance())
    for frame in (a, b, c):
        metric.update(frame, a)
    distances = efficientnet_distance(torch.stack([a, b]), torch.stack([b, c]))
    assert float(metric.compute()) == pytest.approx(float(distances.mean()), rel=1e-5)
    assert 0 < distances[0] < 0.8 * distances[1]
