"""What network priors share: texts embedded once, a precision, rows brought to a device, a fingerprint."""

import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from csd_exp.errors import InputError, accept
from csd_exp.priors.base import Cond, Guidance, Learner, Prior, check_place
from csd_exp.priors.folders import (
    check_family,
    check_parts,
    classes_of,
    fetched_folder,
    in_precision,
    known_folder,
    load_parts,
    quiet,
)
from csd_exp.priors.lora import add_lora, check_lora
from csd_exp.priors.weights import Quantization, Weights, plain_tensors
from csd_exp.schedules import Draw

Mode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
T5 = ("t5", "umt5")  # text encoders that overflow in float16


class NetworkPrior(Prior):
    """A frozen network under texts; subclasses `hold` their parts, give `embed`, `network` and the rest.

    path: a folder in the diffusers layout, a hub id, or loaded `parts`; the first key of every subclass.
    variant: which weight files of it, such as `fp16`, where a part has them. allow_pickle: whether weights
        may be .bin files.
    guidance_scale: w_y of CSD Eq. 2.
    dtype: what the weights are held in. Inputs are cast to it; outputs are float32 on the caller's
        device, float64 where caller and weights are.
    device: null, the Trainer's; `cpu`, `cuda` (of this rank) or `cuda:N`.
    row_chunk: most rows per network call. channels_last: memory format of the convolutions.
    compile: torch.compile the network, also in one of its modes: `reduce-overhead` and `max-autotune` replay
        CUDA graphs. A call is then filled up to whole quarters of row_chunk, as every number of rows is
        compiled by itself.
    offload: whether the denoiser's layers stay in RAM and are brought to the device one by one, by diffusers'
        group offloading; slower, and for weights that the device cannot hold.
    lora, lora_scale: a LoRA's .safetensors file, and the weight of what it adds; fused into the weights, so
        that a row costs what it costs without, but beside them where these are held in few bits.
    weights, quantization: the denoiser's weights from one file, and in few bits; see
        `csd_exp.priors.weights.Weights`.
    Raises InputError, naming the key or the file, for a setting out of range, and for parts that are missing,
    damaged or do not fit.
    """

    parts: ClassVar[Any]  # the NamedTuple of a pipeline's components
    folder_keys: ClassVar[tuple[str, ...]] = ("variant", "allow_pickle", "weights")  # of `check_folder`
    family: ClassVar[str]  # see `csd_exp.families.family_of`
    pipeline: ClassVar[str]  # diffusers' own of the family, whose loaders know what its LoRAs look like
    denoiser: ClassVar[str] = "unet"  # the attribute that is the network which scores
    conditioned = 0  # channels of what `condition` returns

    def __init__(
        self,
        variant: str | None = None,
        allow_pickle: bool = False,
        guidance_scale: float = 7.5,
        dtype: Dtype = "float32",
        device: str | None = None,
        row_chunk: int = 16,
        channels_last: bool = False,
        compile: bool | Mode = False,
        offload: bool = False,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        weights: str | None = None,
        quantization: Quantization | None = None,
    ):
        accept("prior.dtype", dtype, get_args(Dtype))
        if not isinstance(compile, bool) and compile not in get_args(Mode):
            raise InputError(
                f"prior.compile must be true, false, {', '.join(get_args(Mode))}, not {compile!r}."
            )
        if row_chunk < 1:
            raise InputError(f"prior.row_chunk must be at least 1, not {row_chunk}.")
        if compile and offload:
            raise InputError("prior.compile and prior.offload do not go together; choose one of them.")
        check_place(device)
        self.variant, self.allow_pickle = variant, allow_pickle
        self.dtype, self.place = getattr(torch, dtype), device
        self.guidance_scale, self.row_chunk = guidance_scale, row_chunk
        self._fill, self._mode = bool(compile), compile if isinstance(compile, str) else None
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._embeddings: dict[str, Cond] = {}
        self.networks: dict[str, nn.Module] = {}
        self.encoders: dict[str, nn.Module] = {}
        self._arrived, self.offload = True, offload
        self.weights = Weights(weights, quantization)
        if offload and self.weights.few_bits:
            raise InputError("prior.offload is not for weights in few bits; choose one of them.")
        self.lora, self.lora_scale = lora, lora_scale
        if lora is not None:
            check_lora(lora)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        cls.check_settings(config)
        cls.check_folder(config["path"], **{key: config[key] for key in cls.folder_keys if key in config})

    @classmethod
    def check_folder(
        cls,
        path: str | Path,
        variant: str | None = None,
        allow_pickle: bool = False,
        weights: str | None = None,
        **own,
    ) -> None:
        """Raise InputError unless `path` is a usable prior; reads configurations, never weights.

        A hub id passes when the hub, or its local cache, has it. own: what else `needed` takes.
        """
        folder = known_folder(path)
        if folder is not None:
            needed = cls.needed(path, folder, **own)
            cls.check_fit(path, check_parts(path, folder, needed, variant, allow_pickle, weights))

    @classmethod
    def needed(cls, path: str | Path, folder: Path) -> dict[str, type]:
        """The parts of a folder that are used, with their classes; refuses a folder of another family."""
        check_family(path, folder, cls.family)
        return classes_of(cls.parts)

    @staticmethod
    @abstractmethod
    def check_fit(path: str | Path, configs: Mapping[str, dict]) -> None:
        """Raise InputError unless parts with these configurations fit the family and each other."""

    def found(self, path: str | Path | tuple, **own) -> Any:
        """The `parts` that are given, or those of a folder or hub id; own: what else `needed` takes."""
        if isinstance(path, tuple):
            return path
        folder = fetched_folder(path, self.variant)
        self.check_folder(folder, self.variant, self.allow_pickle, self.weights.file, **own)
        needed = self.needed(path, folder, **own)
        loaded = load_parts(path, folder, needed, self.variant, self.dtype, self.weights)
        return self.parts(**loaded, **self.beside(path, folder))

    @staticmethod
    def beside(path: str | Path, folder: Path) -> dict[str, Any]:
        """What `parts` hold of a folder beside its components."""
        return {}

    @classmethod
    def check_settings(cls, config: Mapping[str, Any]) -> None:
        """What `check` of every family looks at beside the folder."""
        Weights(config.get("weights"), config.get("quantization"))
        if config.get("lora") is not None:
            check_lora(config["lora"])

    def keep(self, networks: dict[str, Any], encoders: dict[str, Any]) -> None:
        """Freeze the networks in `dtype`; those that convolve in the memory format asked for.

        encoders: of texts, one of which is on the device while a new text is embedded.
        """
        self.networks, self.encoders = networks, encoders
        if self.lora is not None:
            parts = {name: part for name, part in {**networks, **encoders}.items() if name != "vae"}
            add_lora(self.pipeline, parts, self.lora, self.lora_scale, not self.weights.few_bits)
        for network in (*networks.values(), *encoders.values()):
            self.freeze(network)

    def freeze(self, network: Any) -> None:
        """Make a network ready to be asked, in its precision."""
        with quiet():
            in_precision(network.eval().requires_grad_(False), self.precision_of(network))

    def precision_of(self, network: Any) -> torch.dtype:
        """What a network is held in: `dtype`, but for what overflows in it."""
        overflows = self.dtype == torch.float16 and getattr(network.config, "model_type", "") in T5
        return torch.bfloat16 if overflows else self.dtype

    def settled(self) -> None:
        """Take the networks for being where they are to be."""
        self._arrived, self._fill, self._mode = True, False, None

    def to(self, device: torch.device) -> None:
        """The networks come with the first row, when texts are embedded."""
        super().to(device)
        self._arrived = False
        for text in self._embeddings.values():
            text.update({name: tensor.to(self.device) for name, tensor in text.items()})

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 of the weights as held and of `described`: settings and vocabulary of their training."""
        digest = hashlib.sha256(repr(self.described()).encode())
        if self.lora is not None and self.weights.few_bits:
            digest.update(repr(self.lora_scale).encode())  # of what lies beside the weights
        tensors = {"alphas_cumprod": self.alphas_cumprod}
        owners: list[str] = []
        for part, network in (self.networks | self.encoders).items():
            kind = type(network).__name__
            owners.append(f"{kind}.{part}" if kind in owners else kind)
            for name, tensor in network.state_dict().items():
                tensors |= dict(plain_tensors(f"{owners[-1]}.{name}", tensor))
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @abstractmethod
    def described(self) -> object:
        """What the weights mean beside their values, for the fingerprint."""

    @classmethod
    def check_learner(cls, config: Mapping[str, Any]) -> None:
        if find_spec("peft") is None:
            raise InputError(
                "method=vsd trains a LoRA of the prior by peft, which is not installed: pip install "
                "'csd_exp[lora]'."
            )
        for key, accepted in {"offload": (None, False), "device": (None, "auto")}.items():
            if config.get(key) not in accepted:
                raise InputError(
                    f"prior.{key}={config[key]} does not go with method=vsd, whose LoRA is trained on the "
                    f"Trainer's device; prior.{key} must be {'false' if key == 'offload' else 'null'}."
                )

    def learner(self, rank: int, draw: Draw) -> Learner:
        from csd_exp.priors.learner import LoRA

        return LoRA(self, rank, draw)

    def guidance(self, prompt: str, condition: Tensor | None = None, negative_prompt: str = "") -> Guidance:
        """eps(null) + w_y (eps(text) - eps(null)): CSD Eq. 2; null is the negative prompt."""
        text, null = self.embedding(prompt), self.embedding(negative_prompt)
        return [(self.guidance_scale, text), (1 - self.guidance_scale, null)]

    def embedding(self, prompt: str) -> Cond:
        """What the text encoders make of a prompt, as diffusers' pipelines do; once for each string."""
        if prompt not in self._embeddings:
            with self._in_turn():
                self._embeddings[prompt] = self.embed(prompt)
        return self._embeddings[prompt]

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Within it each text encoder is on the device only while it is asked."""

        def come(encoder: nn.Module, _: Any) -> None:
            encoder.to(self.device)

        def go(encoder: nn.Module, *_: Any) -> None:
            encoder.to("cpu")

        with ExitStack() as hooks:
            for encoder in self.encoders.values():
                hooks.enter_context(encoder.register_forward_pre_hook(come))
                hooks.enter_context(encoder.register_forward_hook(go, always_call=True))
            yield

    @abstractmethod
    def embed(self, prompt: str) -> Cond:
        """What `embedding` keeps: `text` [L, D] and what else the family knows of a prompt, in `dtype`."""

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The network's output of rows x [r, ...] at timesteps t [r], all as the network takes them."""

    def predicted(self, x: Tensor, t: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The same for the caller's rows."""
        if not self._arrived:
            self._arrive()
        n = len(x)
        more = self.filled(n) - n
        seen, t = self.seen(x, conds), t.to(self.device)
        if more:
            seen, t = (torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) for rows in (seen, t))
            conds = [*conds, *[conds[-1]] * more]
        if self._mode is not None:  # a replayed graph writes where its last output was, which is used up
            torch.compiler.cudagraph_mark_step_begin()
        out = self.network(self.held(seen), t, conds)
        return self.returned(out[:n], x)

    def compiled(self, networks: Iterable[nn.Module]) -> None:
        """Have them compiled when they are called first, where `compile` asks for it."""
        for network in networks if self._fill else ():
            network.compile(dynamic=False, mode=self._mode)

    def filled(self, n: int) -> int:
        """How many rows go through the network in a call of n: those of compiled calls are of few numbers."""
        quarter = -(-self.row_chunk // 4)
        return max(n, min(-(-n // quarter) * quarter, self.row_chunk)) if self._fill else n

    def _arrive(self) -> None:
        for name, network in self.networks.items():
            if self.offload and name != "vae":
                cast(Any, network).enable_group_offload(
                    self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
                )
            else:
                network.to(self.device)
        self._arrived = True  # not before: where memory is short for all of them, the rest comes later

    def seen(self, x: Tensor, conds: Sequence[Cond]) -> Tensor:
        """The channels that the network takes of rows x."""
        return x

    def texts(self, conds: Sequence[Cond], name: str = "text") -> Tensor:
        """A tensor of each row's text, that of the empty text where a row has none."""
        return torch.stack([self.embedding("")[name] if c[name] is None else c[name] for c in conds])

    def held(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As the networks take it."""
        layout = self._layout if x.ndim == 4 else torch.contiguous_format
        return x.to(self.device, dtype or self.dtype).contiguous(memory_format=layout)

    def returned(self, out: Tensor, caller: Tensor) -> Tensor:
        """As the caller gets it."""
        double = caller.dtype == self.dtype == torch.float64
        return out.to(caller.device, torch.float64 if double else torch.float32)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What a transformer repeats: one compilation serves all."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else ()


def tokenized(tokenizer: Any, prompt: str, limit: int | None = None) -> Any:
    """The tokens of a prompt, filled up and cut to `limit`, by default the tokenizer's; warns where cut."""
    limit = tokenizer.model_max_length if limit is None else limit
    with quiet():
        length = len(tokenizer(prompt).input_ids)
    if length > limit:
        warnings.warn(
            f"The prompt {prompt!r} has {length} tokens and the text encoder reads the first {limit}.",
            stacklevel=5,
        )
    return tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")


def settings(model: Any) -> list[tuple[str, object]]:
    """The configuration of a network, for the fingerprint."""
    return sorted((key, repr(value)) for key, value in model.config.items() if not key.startswith("_"))
