"""A denoiser's weights from one file in the place of its folder's, and in few bits, by diffusers' means."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from torch import Tensor

from csd_exp.errors import InputError, accept

Quantization = Literal["nf4", "int8"]
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", ".gguf": "gguf"}
DENOISERS = ("unet", "transformer")  # parts of a pipeline


@dataclass(frozen=True)
class Weights:
    """Where a denoiser's weights are and how they are held.

    file: a .safetensors or .gguf file in the place of the folder's weights, None for these. quantization:
    `nf4`, 4 bits by bitsandbytes on a GPU, or `int8`, 8 bits by torchao; None leaves them as `prior.dtype`
    says. A .gguf file has bits of its own. Raises InputError, naming the key, for what cannot be read.
    """

    file: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self):
        if self.quantization is not None:
            accept("prior.quantization", self.quantization, get_args(Quantization))
        for key, kind, value in (
            ("quantization", self.quantization, self.quantization),
            ("weights", self.ending, self.file),
        ):
            package = PACKAGES.get(kind or "")
            if package is not None and find_spec(package) is None:
                raise InputError(
                    f"prior.{key}={value} needs the package {package}: pip install 'csd_exp[quantized]'."
                )
        if self.file is None:
            return
        if self.ending not in (".safetensors", ".gguf") or not Path(self.file).expanduser().is_file():
            raise InputError(
                f"prior.weights={self.file} is no .safetensors or .gguf file; give one with the denoiser's "
                "weights, or leave it out to take those of prior.path."
            )
        if self.ending == ".gguf" and self.quantization is not None:
            raise InputError(
                f"prior.weights={self.file} has bits of its own; leave out "
                f"prior.quantization={self.quantization}."
            )

    @property
    def ending(self) -> str | None:
        """Of the file's name."""
        return None if self.file is None else Path(self.file).suffix

    @property
    def few_bits(self) -> bool:
        """Whether weights are held in other than a floating point's bits."""
        return self.quantization is not None or self.ending == ".gguf"

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What diffusers' loaders take for it, computing in `dtype`."""
        if self.quantization == "nf4":
            config = diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        elif self.quantization == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
        elif self.ending == ".gguf":
            config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        else:
            return {"torch_dtype": dtype}
        return {"torch_dtype": dtype, "quantization_config": config}

    def load(self, folder: Path, part: str, cls: Any, dtype: torch.dtype) -> Any:
        """The denoiser of the file, in the configuration of a folder's part."""
        assert self.file is not None
        try:
            network = cls.from_single_file(
                str(Path(self.file).expanduser()),
                config=str(folder),
                subfolder=part,
                local_files_only=True,
                **self.options(dtype),
            )
        except Exception as e:  # libraries raise many types on unusable files
            raise InputError(
                f"prior.weights={self.file} does not hold the {part} of prior.path={folder} "
                f"({' '.join(str(e).split())[:200]})."
            ) from e
        lacking = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
        if lacking:
            raise InputError(
                f"prior.weights={self.file} lacks {len(lacking)} tensors of the {part} of "
                f"prior.path={folder}, {min(lacking)} for one."
            )
        return network


OF_FOLDER = Weights()


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that one is made of, where it is held in few bits; else itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor.as_subclass(Tensor)
