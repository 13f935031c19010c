"""The one training loop of the embedded models: exact resume, moving average, losses in a CSV."""

import csv
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from csd_exp.errors import InputError
from csd_exp.files import whole, write_whole

CHECKPOINT_SECONDS = 60
LOG_STEPS = 20  # losses are read together, since reading one waits for the GPU


def generator(*key: int) -> np.random.Generator:
    """A numpy generator that depends on the integers of `key` and nothing else."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def save(value: object, file: Path) -> None:
    """torch.save that never leaves half a file."""
    with whole(file) as partial:
        torch.save(value, partial)


def torch_generator(*key: int, device: str = "cpu") -> torch.Generator:
    """A generator on `device` that depends on the integers of `key` and nothing else."""
    return torch.Generator(device).manual_seed(int(generator(*key).integers(2**62)))


def run_folder(cfg: DictConfig, trained: list[str]) -> Path:
    """`cfg.run_dir`, made where it is new; `trained` are the keys that a run cannot be continued without.

    Raises InputError where it holds a run with other values of them.
    """
    folder, wanted = Path(cfg.run_dir), OmegaConf.masked_copy(cfg, trained)
    OmegaConf.resolve(wanted)
    found = folder / "config.yaml"
    if found.exists() and OmegaConf.load(found) != wanted:
        raise InputError(f"run_dir={folder} holds a run of another configuration; give another run_dir.")
    write_whole(found, OmegaConf.to_yaml(wanted))
    return folder


def posterior_mean(noisy: Tensor, alpha_bar: Tensor, answers: Tensor) -> Tensor:
    """E[x_0 | x_t] of noisy latents [n, C, h, w] where x_0 is any of `answers` [n, k, C, h, w].

    The mean of answers a weighted by exp(-|x_t - sqrt(alpha_bar) a|^2 / (2 (1 - alpha_bar))), alpha_bar
    [n, 1, 1, 1].
    """
    apart = (noisy[:, None] - alpha_bar.sqrt()[:, None] * answers).square().flatten(2).sum(2)
    weights = (-apart / (2 * (1 - alpha_bar.flatten(1)))).softmax(1)
    # no matrix product, which autocast would take in half precision
    return (weights[..., None, None, None] * answers).sum(1)


def velocity_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    scheduler: Any,
    rng: torch.Generator,
    answers: Tensor | None = None,
) -> Tensor:
    """Squared error of the velocity (Salimans and Ho 2022, appendix D) of noised latents [n, C, h, w].

    `denoise(noisy, t)` estimates it. Timesteps [n] are spread over the batch, more of them at high noise,
    where the answer is not yet to be seen. Where each row was drawn from `answers` [n, k, C, h, w], the
    velocity is that to their mean as seen from x_t: equal in expectation and free of the luck of the draw
    (the stable targets of Xu et al. 2023, over all answers to one instruction). `rng` is on the device of
    `clean`.
    """
    last = scheduler.config.num_train_timesteps - 1
    # In single precision the spread may round to 1.
    t = (_spread(len(clean), rng) * (last + 1)).long().clamp(max=last)
    noise = torch.randn(clean.shape, generator=rng, device=clean.device)
    noisy = scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
    alpha_bar = scheduler.alphas_cumprod.to(clean)[t][:, None, None, None]
    x_0 = clean if answers is None else posterior_mean(noisy, alpha_bar, answers)
    velocity = (alpha_bar.sqrt() * noisy - x_0) / (1 - alpha_bar).sqrt()
    return F.mse_loss(denoise(noisy, t).float(), velocity)


def flow_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    rng: torch.Generator,
    answers: Tensor | None = None,
) -> Tensor:
    """Squared error of the velocity noise - x_0 of a rectified flow (Liu et al. 2023), as `velocity_loss`.

    `denoise(x_s, s)` estimates it at x_s = (1 - s) x_0 + s noise; places s [n] are spread as timesteps are.
    """
    places = _spread(len(clean), rng).clamp(min=1e-3)
    noise = torch.randn(clean.shape, generator=rng, device=clean.device)
    s = places[:, None, None, None]
    noisy = ((1 - s) * clean + s * noise).contiguous(memory_format=torch.channels_last)
    length = ((1 - s).square() + s.square()).sqrt()
    x_0 = clean
    if answers is not None:
        x_0 = posterior_mean(noisy / length, ((1 - s) / length).square(), answers)
    return F.mse_loss(denoise(noisy, places).float(), (noisy - x_0) / s)


def _spread(size: int, rng: torch.Generator) -> Tensor:
    """[size] in [0, 1], on the device of `rng`: stratified, and denser towards 1, which is all noise."""
    jitter = torch.rand(size, generator=rng, device=rng.device)
    return 1 - (1 - (torch.arange(size, device=rng.device) + jitter) / size) ** 1.5


def fit(
    file: Path,
    model: nn.Module,
    batches: Callable[[int], Iterable],
    loss: Callable[[nn.Module, Any, int], Tensor],
    options: DictConfig,
    device: str,
    bf16: bool,
) -> Any:
    """Trains `model` for `options.steps` and returns its moving average; continues where `file` stopped.

    `batches(first)` yields batch `first`, `first` + 1, ...; `loss(model, batch, k)` is that of batch k. AdamW
    with warm-up and cosine; losses go to a CSV beside `file`.
    """
    model.to(device).to(memory_format=torch.channels_last).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.99))
    first, log = 0, []
    unread: list[Tensor] = []
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, log = state["step"], state["log"]

    def read() -> None:
        losses = torch.stack(unread).tolist() if unread else []
        log.extend((step, round(loss, 6)) for step, loss in enumerate(losses, len(log)))
        unread.clear()

    def checkpoint(step: int) -> None:
        read()
        parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        save(state | {"step": step, "log": log}, file)
        with open(file.with_suffix(".csv"), "w", newline="") as table:
            csv.writer(table).writerows([("step", "loss"), *log])

    saved = time.monotonic()
    bar = tqdm(batches(first), file.stem, options.steps, initial=first, mininterval=1.0)
    for k, batch in enumerate(bar, first):
        rate = min((k + 1) / options.warmup, 0.5 + 0.5 * math.cos(math.pi * k / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(model, batch, k)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        unread.append(value.detach())
        if len(unread) == LOG_STEPS:
            read()
            bar.set_postfix(loss=f"{np.mean([entry[1] for entry in log[-LOG_STEPS:]]):.4f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint(k + 1)
            saved = time.monotonic()
    if first < options.steps:
        checkpoint(options.steps)
    return average.module.eval()
