"""Content Credentials, read back by the reader of c2pa; needs c2pa-python and cryptography."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

import csd_exp
from csd_exp.callbacks import ContentCredentials
from csd_exp.errors import InputError
from csd_exp.origin import EDITED, GENERATED
from csd_exp.videos import Frames

c2pa = pytest.importorskip("c2pa")
x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

ANALYTIC = (
    *("prior=analytic", "prior.window=16", "+prior.prompts.warm=[0,1]", "metrics=none", "logger=csv"),
    *("callbacks=signed", "callbacks.metrics.every_n_steps=0", "prompt=warm"),
)


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> dict[str, Path]:
    """A signer's certificate below one of nobody's, and its key."""
    folder = tmp_path_factory.mktemp("papers")
    above, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    papers = [certificate("Signer", own, above, False), certificate("Above", above, above, True)]
    pem = [paper.public_bytes(serialization.Encoding.PEM) for paper in papers]
    (folder / "chain.pem").write_bytes(b"".join(pem))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(own.private_bytes(serialization.Encoding.PEM, *form))
    return {"certificate": folder / "chain.pem", "key": folder / "key.pem"}


def certificate(name, key, signer, above):
    def named(common):
        given = {x509.NameOID.ORGANIZATION_NAME: "Test", x509.NameOID.COMMON_NAME: common}
        return x509.Name([x509.NameAttribute(*pair) for pair in given.items()])

    usage = x509.KeyUsage(not above, *[False] * 4, above, *[False] * 3)
    purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(named("Above"), named(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(1))
        .add_extension(x509.BasicConstraints(above, None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    made = made if above else made.add_extension(purpose, False)
    return made.sign(signer, hashes.SHA256())


def edited(papers, folder: Path, *overrides: str, **values: object) -> Path:
    given = {f"callbacks.credentials.{name}": file for name, file in papers.items()}
    return csd_exp.edit(*ANALYTIC, *overrides, **given, **values, **{"hydra.run.dir": folder / "run"}).run_dir


def read(file: Path) -> dict:
    """The manifest of a file; nothing of it has been changed since."""
    reader = c2pa.Reader(str(file))
    assert reader.get_validation_state() in ("Valid", "Trusted")
    found = json.loads(reader.json())
    return found["manifests"][found["active_manifest"]]


def actions(manifest: dict) -> list[dict]:
    (made,) = [a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
    return made


def test_edited_pictures_are_signed_with_their_source(papers, tmp_path):
    for i in range(2):
        Image.new("RGB", (16, 16), (9 + i, 99, 199)).save(tmp_path / f"{i}.png")
    own = ["experiment=images", "steps=2", "callbacks.media.at=[1]"]
    run = edited(papers, tmp_path, *own, **{"modality.path": [tmp_path / "0.png", tmp_path / "1.png"]})
    for name in ("edited_01", "edited_000001_01", "difference_x2_01"):
        manifest = read(run / f"media/{name}.png")
        assert [parent["title"] for parent in manifest["ingredients"]] == ["source_01.png"]
        opened, action = actions(manifest)
        assert (opened["action"], action["action"]) == ("c2pa.opened", "c2pa.edited")
        assert action["digitalSourceType"] == EDITED
        assert manifest["signature_info"]["issuer"] == "Test"
    with Image.open(run / "media/edited_00.png") as image:
        assert "DigitalSourceType" in image.info["xmp"].decode()
    assert "PRIVATE KEY" not in (run / "config.yaml").read_text()
    with pytest.raises(c2pa.C2paError):
        c2pa.Reader(str(run / "media/source_00.png"))


def test_a_signed_file_that_is_changed_is_valid_no_more(papers, tmp_path):
    Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "x.png")
    run = edited(papers, tmp_path, "experiment=panorama", "steps=1", **{"modality.path": tmp_path / "x.png"})
    content = bytearray((run / "media/edited.png").read_bytes())
    content[-20] ^= 1  # of the pixels' checksum
    (tmp_path / "changed.png").write_bytes(content)
    assert c2pa.Reader(str(tmp_path / "changed.png")).get_validation_state() == "Invalid"


def test_videos_are_signed_and_still_played(papers, tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 16), (50 * i, 99, 199)).save(tmp_path / f"frames/{i}.png")
    run = edited(
        papers,
        tmp_path,
        *("experiment=video", "metrics=none", "steps=2", "callbacks.media.at=[1]"),
        **{"modality.path": tmp_path / "frames"},
    )
    for name in ("edited.mp4", "edited.gif", "side_by_side.mp4", "edited/000001.png", "edited_000001.png"):
        assert actions(read(run / "media" / name))[-1]["digitalSourceType"] == EDITED
    assert len(list(Frames(run / "media/edited.mp4"))) == 2


def test_generated_pictures_are_created(papers, tmp_path):
    own = ["experiment=generate", "prior=analytic", "steps=1", "modality.prompts=null", "modality.size=16"]
    run = edited(papers, tmp_path, *own)
    (action,) = actions(read(run / "media/edited.png"))
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", GENERATED)


def test_what_cannot_sign_is_refused_in_a_sentence(papers, tmp_path):
    (tmp_path / "no.pem").write_text("no key")
    for wrong in ({"key": tmp_path / "no.pem"}, {"certificate": tmp_path / "missing.pem"}):
        with pytest.raises(InputError, match=r"callbacks\.credentials cannot sign with certificate="):
            ContentCredentials(tmp_path, **{**{k: str(v) for k, v in papers.items()}, **wrong})
    with pytest.raises(InputError, match=r"callbacks\.credentials\.algorithm must be one of es256"):
        ContentCredentials(tmp_path, **{k: str(v) for k, v in papers.items()}, algorithm="rot13")
