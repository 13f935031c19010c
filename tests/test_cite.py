"""What a run was composed of, as BibTeX: over all configurations there are."""

import re
import sys
import unicodedata
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from csd_exp import cite
from csd_exp.config import composed, conf_dir
from csd_exp.targets import located

GROUPS = ("method", "kernel", "features", "prior", "modality", "metrics")
# Nobody else's, or arithmetic as old as the hills.
OURS = {
    *("Answers", "AnswerDisagreement", "AnswerDistance", "EditStrength", "WindowSpread", "colour_statistics"),
    *(
        "SeamEnergy",
        "ColourSeams",
        "PSNROutside",
        "ReconstructionPSNR",
        "ReconstructionDistance",
        "Diversity",
    ),
    *("GaussianMixture", "GaussianFlow", "GaussianClips", "Pooled"),
    *(
        "Panorama",
        "Images",
        "Video",
        "Clips",
        "Generated",
        "GeneratedScene",
        "EditedPhotographs",
        "EditedField",
    ),
}


def targets() -> dict[str, str]:
    """Every class and function that a configuration of these groups names, and one file that does."""
    files = [file for group in GROUPS for file in sorted((conf_dir() / group).rglob("*.yaml"))]
    named = [
        (name, file) for file in files for name in re.findall(r"_target_: (csd_exp\.\S+)", file.read_text())
    ]
    return {name: str(file.relative_to(conf_dir())) for name, file in named}


@pytest.mark.parametrize("target", targets())
def test_everything_has_its_citation_or_is_known_to_have_none(target):
    found, name = cite.mentions(located(target)), target.rpartition(".")[2]
    assert bool(found) != (name in OURS), f"{targets()[target]}: {target} cites {found}"
    assert set(found) <= cite.references().keys()


def test_every_entry_is_somebodys_and_is_named_after_its_first_author_and_year():
    used = {key for target in targets() for key in cite.mentions(located(target))}
    entries = cite.references()
    assert list(entries) == sorted(entries)
    assert entries.keys() == used | set(cite.SETTINGS.values())
    for key, entry in entries.items():
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, re.MULTILINE))
        assert re.fullmatch(r"@(inproceedings|article)\{\S+,\n(  \w+ = \{.*\},\n)+\}", entry)
        assert entry.count("{") == entry.count("}")
        assert {"author", "title", "year"} < fields.keys()
        assert ("journal" in fields) == entry.startswith("@article")
        assert key == plain(fields["author"].partition(",")[0]) + fields["year"]
        assert re.fullmatch(r"\d{4}\.\d{5}|\d{4}\.\d{4}", fields.get("eprint", "0000.00000"))


def plain(name: str) -> str:
    """In small letters without accents."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()


def cited(*overrides: str) -> set[str]:
    given = ["experiment=panorama", "modality.path=x.jpg", "metrics=none", "prompt=x", *overrides]
    config = composed(list({one.partition("=")[0]: one for one in given}.values()))
    text = "\n".join(cite.bibliography(config))
    return set(re.findall(r"^@\w+\{(\S+),$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], {"kim2023", "liu2016", "hertz2023"}),
        (["kernel=imq"], {"kim2023", "liu2016", "hertz2023", "gorham2017"}),
        (["method=dds"], {"hertz2023"}),
        (["method=dds", "kernel.space=features"], {"hertz2023"}),
        (["method=csd"], {"kim2023", "liu2016", "poole2023"}),
        (["method=pds"], {"koo2024"}),
        (["method=dds", "taper=gaussian"], {"hertz2023", "jimenez2023"}),
        (["method=dds", "taper=hann"], {"hertz2023"}),
        (["method=multidiffusion", "kernel=rbf"], {"bar-tal2023", "song2021", "lin2024"}),
        (
            ["kernel.space=features", "features=perceptual"],
            {"kim2023", "liu2016", "hertz2023", "zhang2018", "tan2019"},
        ),
    ],
)
def test_only_what_a_run_has_used_is_cited(overrides, keys):
    assert cited("prior=analytic", *overrides) == keys


def test_prior_field_and_metrics_are_cited():
    assert cited("method=sds") == {"poole2023", "brooks2023", "rombach2022"}
    assert cited("prior=analytic", "method=sds", "metrics=full") >= {"wang2004", "radford2021", "lai2018"}
    assert "kerbl2023" in cited("experiment=scene", "modality/field=splats")


def test_editing_all_photographs_first_is_dges():
    updates = ("csd", "in2n", "direct", "all")
    found = [cited("experiment=scene", "prior=analytic", f"update={update}") for update in updates]
    assert ["chen2024" in keys for keys in found] == [False, False, False, True]


def test_every_method_can_be_cited():
    for method in sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml")):
        assert cited(f"method={method}", "prior=analytic")


@pytest.mark.soak
@pytest.mark.parametrize("group", ["experiment", "preset", "update"])
def test_every_experiment_cites_its_method_and_its_prior(group):
    for name in sorted(file.stem for file in (conf_dir() / group).glob("*.yaml")):
        config = composed([f"{group}={name}"])
        text = "\n".join(cite.bibliography(config))
        for part in ("method.", "prior="):
            assert re.search(rf"^% .*\b{re.escape(part)}.*\n@", text, re.MULTILINE), (name, part)


@pytest.fixture
def run(tmp_path) -> Path:
    config = composed(["experiment=panorama", "modality.path=x.jpg", "prompt=x", "metrics=none"])
    plain = OmegaConf.create({key: value for key, value in config.items() if key != "hydra"})
    plain.kernel._target_ = "my_lab.kernels.Mine"
    OmegaConf.save(plain, tmp_path / "config.yaml")
    return tmp_path


def test_the_command_line(run, monkeypatch, capsys, refused):
    monkeypatch.setattr(sys, "argv", ["csd-cite", str(run)])
    cite.main()
    out = capsys.readouterr().out
    assert "% method.residual=methods.dds\n@inproceedings{hertz2023,\n" in out
    assert out.endswith(
        "% nothing to cite is known of modality=particles.Panorama, kernel=my_lab.kernels.Mine\n"
    )
    assert "@" not in "".join(line for line in out.splitlines() if line.startswith("%"))
    for arguments in ([], [str(run), "more"], [str(run / "nowhere")]):
        refused(cite.main, "csd-cite", *arguments)
