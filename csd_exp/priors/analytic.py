"""Gaussian mixtures whose diffused scores are known in closed form: to test the mathematics exactly."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError
from csd_exp.priors.base import Cond, Guidance, Learner, Prior, ViewShape
from csd_exp.priors.flow import RectifiedFlow
from csd_exp.schedules import Draw


class GaussianMixture(Prior):
    """x_0 ~ sum_k pi_k N(mean_k, std^2 I) over latents, images at one latent per pixel, in [-1, 1].

    means: [K, C] (one colour per component, the same at every position) or [K, C, h, w].
    prompts: mixture weights for each prompt; any other prompt, the empty one included, has the weights of "".
    image_std: an image condition is x_0 plus normal noise of this standard deviation, so conditioning on
    an image is again a mixture, by Bayes.
    guidance_scale, image_guidance_scale: w_y and w_s of InstructPix2Pix Eq. 3; without an image
    condition, guidance_scale alone, as in classifier-free guidance.
    """

    def __init__(
        self,
        means: Sequence | Tensor = ((-0.6, -0.2, 0.3), (0.7, 0.3, -0.5)),
        std: float = 0.2,
        prompts: Mapping[str, Sequence[float]] | None = None,
        image_std: float = 1.0,
        guidance_scale: float = 1.0,
        image_guidance_scale: float = 1.0,
        window: int = 16,
        row_chunk: int = 64,
    ):
        if row_chunk < 1:
            raise InputError(f"prior.row_chunk must be at least 1, not {row_chunk}.")
        for name, deviation in (("std", std), ("image_std", image_std)):
            if not deviation > 0:
                raise InputError(f"prior.{name} must be above 0, not {deviation}.")
        try:
            means = torch.as_tensor(means, dtype=torch.float64)
        except (TypeError, ValueError) as e:
            raise InputError(f"prior.means must be lists of numbers, all of one length, not {means}.") from e
        if means.ndim not in (2, 4) or not means.numel():
            raise InputError(f"prior.means must list colours, one for each component, not {means.tolist()}.")
        self.means = means if means.ndim == 4 else means[:, :, None, None]
        self.std, self.image_std = std, image_std
        self.prompts = {"": [1.0] * len(self.means)} | dict(prompts or {})
        for prompt, weights in self.prompts.items():
            if len(weights) != len(self.means) or min(weights) < 0 or sum(weights) <= 0:
                raise InputError(
                    f"prior.prompts[{prompt!r}] needs {len(self.means)} weights >= 0 that are not all zero, "
                    f"not {list(weights)}."
                )
        self._texts = {p: torch.tensor(w, dtype=torch.float64) for p, w in self.prompts.items()}
        self.guidance_scale, self.image_guidance_scale = guidance_scale, image_guidance_scale
        self.views, self.row_chunk = ViewShape(1, self.means.shape[1], window), row_chunk
        self.alphas_cumprod = self._levels()
        described = repr((self.means.tolist(), std, image_std, sorted(self.prompts.items())))
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def _levels(self) -> Tensor:
        """The scaled-linear schedule of Stable Diffusion."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        return torch.cumprod(1 - betas, 0)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return 2 * image - 1

    def decode(self, latent: Tensor) -> Tensor:
        return (latent + 1) / 2

    def condition(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.encode(image)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        null = self._weights(negative_prompt)
        text = null if prompt == negative_prompt else self._weights(prompt)
        w_y, w_s = self.guidance_scale, self.image_guidance_scale
        nothing = Cond(text=null)
        if condition is None:
            return [(w_y, nothing if text is null else Cond(text=text)), (1 - w_y, nothing)]
        image = Cond(text=null, image=condition)
        both = image if text is null else Cond(text=text, image=condition)
        return [(w_y, both), (w_s - w_y, image), (1 - w_s, nothing)]

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """-sigma_t grad log p_t(x_t | c), exact, in the dtype of x_t."""
        alpha_bar = self.alphas_cumprod.to(x_t.device)[t].to(x_t.dtype)
        return torch.stack([self._eps(x, a, c) for x, a, c in zip(x_t, alpha_bar, conds, strict=True)])

    def _eps(self, x_t: Tensor, alpha_bar: Tensor, cond: Cond) -> Tensor:
        means, variance, log_weights = self._posterior(x_t, cond)
        alpha, spread = alpha_bar.sqrt(), alpha_bar * variance + 1 - alpha_bar
        away = x_t - alpha * means
        responsibility = torch.softmax(log_weights - away.square().flatten(1).sum(1) / (2 * spread), 0)
        return (1 - alpha_bar).sqrt() * torch.einsum("k,k...->...", responsibility, away) / spread

    def _posterior(self, x: Tensor, cond: Cond) -> tuple[Tensor, float, Tensor]:
        """Means [K, C, h, w], variance and log weights [K] of the mixture given the conditioning."""
        means = self.means.to(x)
        means = (means if x.ndim == 3 else means[:, :, None]).expand(-1, *x.shape)
        weights, image = cond["text"], cond["image"]
        log_weights = (self._weights("") if weights is None else weights).to(x).log()
        if image is None:
            return means, self.std**2, log_weights
        prior_var, image_var = self.std**2, self.image_std**2
        gain = prior_var / (prior_var + image_var)
        away = (image.to(x) - means).square().flatten(1).sum(1)
        return (
            means + gain * (image.to(x) - means),
            gain * image_var,
            log_weights - away / (2 * (prior_var + image_var)),
        )

    @classmethod
    def check_learner(cls, config: Mapping[str, Any]) -> None:
        pass

    def learner(self, rank: int, draw: Draw) -> Learner:
        return LearnedGaussian(self.alphas_cumprod, self.views.channels, self.row_chunk)

    def _weights(self, prompt: str) -> Tensor:
        return self._texts.get(prompt, self._texts[""])


class LearnedGaussian(Learner):
    """The noise estimate of N(mean, std^2) of each channel, which is what it learns, from N(0, 1) on.

    What is trained to find the noise has the mean and the deviation of what is noised, whatever the prompt.
    """

    def __init__(self, alphas_cumprod: Tensor, channels: int, row_chunk: int):
        super().__init__()
        self.alphas_cumprod, self.row_chunk = alphas_cumprod, row_chunk
        self.mean = nn.Parameter(torch.zeros(channels, 1, 1, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.zeros(channels, 1, 1, dtype=torch.float64))

    def eps(self, x_t: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        alpha_bar = self.alphas_cumprod.to(x_t.device)[t].to(x_t).view(-1, *[1] * (x_t.ndim - 1))
        mean, log_std = (p.to(x_t).view(-1, *[1] * (x_t.ndim - 2)) for p in (self.mean, self.log_std))
        variance = log_std.exp() ** 2
        spread = alpha_bar * variance + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / spread


class GaussianFlow(RectifiedFlow, GaussianMixture):
    """The same mixture under a rectified flow: it predicts the velocity E[noise - x_0 | x_s], exactly.

    s runs from 1 / 1000 to 1, where x_s is pure noise. The keys are those of GaussianMixture.
    """

    def __init__(self, *means, **settings):
        super().__init__(*means, **settings)
        self.fingerprint = f"flow-{self.fingerprint}"

    def _levels(self) -> Tensor:
        return self.flow_table(torch.arange(1, 1001, dtype=torch.float64) / 1000)

    def velocity(self, x_s: Tensor, s: Tensor, conds: Sequence[Cond]) -> Tensor:
        return torch.stack([self._velocity(x, float(at), c) for x, at, c in zip(x_s, s, conds, strict=True)])

    def _velocity(self, x_s: Tensor, s: float, cond: Cond) -> Tensor:
        means, variance, log_weights = self._posterior(x_s, cond)
        away, spread = x_s - (1 - s) * means, (1 - s) ** 2 * variance + s**2
        responsibility = torch.softmax(log_weights - away.square().flatten(1).sum(1) / (2 * spread), 0)
        x_0 = torch.einsum("k,k...->...", responsibility, means + (1 - s) * variance / spread * away)
        return (x_s - x_0) / s


class GaussianClips(GaussianMixture):
    """The same mixture over clips [C, f, h, w], all of whose pictures have one component's colour.

    frames: pictures of a clip. period: pictures to a latent in time, whose channels are theirs one after the
    other; a clip's first picture is all of its first latent, as under a causal autoencoder.
    The rest is as for GaussianMixture.
    """

    clips = True

    def __init__(
        self,
        means: Sequence = ((-0.6, -0.2, 0.3), (0.7, 0.3, -0.5)),
        *,
        frames: int = 8,
        period: int = 1,
        **settings,
    ):
        for name, value in (("frames", frames), ("period", period)):
            if value < 1:
                raise InputError(f"prior.{name} must be at least 1, not {value}.")
        if (frames - 1) % period:
            raise InputError(f"prior.frames must be 1 and a multiple of {period}, not {frames}.")
        self.period = period
        super().__init__([list(colour) * period for colour in means], **settings)
        self.views = self.views._replace(frames=frames, period=period)
        self.fingerprint = f"clips-{period}-{self.fingerprint}"

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        x = super().encode(image)
        first = x[:, :, :1].expand(-1, -1, self.period, -1, -1)
        # [n, 3, F, H, W] to [n, period * 3, f, H, W]
        x = torch.cat([first, x[:, :, 1:]], dim=2).unflatten(2, (-1, self.period))
        return x.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)

    def decode(self, latent: Tensor) -> Tensor:
        x = super().decode(latent).unflatten(1, (self.period, -1)).permute(0, 2, 3, 1, 4, 5)
        first = x[:, :, :1].mean(3)
        return torch.cat([first, x[:, :, 1:].flatten(2, 3)], dim=2)
