"""Content Credentials: what files say of themselves, signed."""

# mypy: disable-error-code="override"

import re
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from csd_exp.errors import InputError, accept
from csd_exp.files import whole
from csd_exp.module import ParticleModule
from csd_exp.origin import EDITED, SOFTWARE

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]
SIGNED = ("edited*.*", "edited/*.png", "side_by_side.*", "difference_*.png")
FORMATS = {".png": "image/png", ".mp4": "video/mp4", ".gif": "image/gif"}


class ContentCredentials(L.Callback):
    """Signs, at the end, every picture and video under `dir/media` that the model has had a hand in.

    A C2PA manifest (Content Credentials, specification 2) in each file says that its source was opened and
    edited, or that it was created, by a trained model; it covers all of the file, labels included. It stands
    behind `Media` among the callbacks, and needs c2pa-python: pip install 'csd_exp[sign]'. Signing asks no
    network.

    certificate: a PEM file of the signer's certificate and those above it. key: a PEM file of its private
    key, which is read and not kept. algorithm: of the key. Raises InputError for any that cannot sign.
    """

    def __init__(self, dir: str | Path, certificate: str, key: str, algorithm: Algorithm = "es256"):
        accept("callbacks.credentials.algorithm", algorithm, get_args(Algorithm))
        self.media = Path(dir) / "media"
        self.signer = _signer(certificate, key, algorithm)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: ParticleModule) -> None:
        for file in sorted(file for pattern in SIGNED for file in self.media.glob(pattern)):
            if file.suffix in FORMATS:
                self._sign(file, module.particles.has_source)

    def _sign(self, file: Path, edited: bool) -> None:
        import c2pa

        name, version = SOFTWARE.split(" ")
        generator = {"name": name, "version": version}
        builder = c2pa.Builder({"claim_generator_info": [generator], "title": file.name})
        if edited:
            builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
            source = _source(file, self.media)
            with source.open("rb") as opened:
                parent = {"title": source.name, "relationship": "parentOf"}
                builder.add_ingredient(parent, FORMATS[source.suffix], opened)
            action = {"action": "c2pa.edited", "digitalSourceType": EDITED, "softwareAgent": {"name": name}}
            builder.add_action(action)
        else:
            made = c2pa.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, made)
        with whole(file) as partial, file.open("rb") as unsigned, partial.open("w+b") as signed:
            builder.sign(self.signer, FORMATS[file.suffix], unsigned, signed)


def _source(file: Path, media: Path) -> Path:
    """What an edited file was made from: `edited_000050_03.png` from `source_03.png`."""
    if file.parent != media:
        return media / "source" / file.name
    number = re.search(r"(_\d{2,5})?$", file.stem)
    source = media / f"source{number[0] if number else ''}{file.suffix}"
    return source if source.is_file() else media / "source/000000.png"  # of a video, shown on the way


def _signer(certificate: str, key: str, algorithm: Algorithm) -> Any:
    try:
        import c2pa
    except ImportError as e:
        raise InputError("callbacks.credentials needs c2pa-python; pip install 'csd_exp[sign]'.") from e
    try:
        chain, private = Path(certificate).read_bytes(), Path(key).read_bytes()
        return c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, private, None))
    except (OSError, c2pa.C2paError) as e:
        raise InputError(
            f"callbacks.credentials cannot sign with certificate={certificate} and key={key} as {algorithm} "
            f"({' '.join(str(e).split())})."
        ) from e
