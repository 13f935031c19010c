"""What the pictures and videos of a run tell of how they were made, to whoever they come to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from csd_exp.formats import spheres
from csd_exp.formats.labels import Label, packet

# Terms of http://cv.iptc.org/newscodes/digitalsourcetype, what IPTC recommends for media of trained models.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
EDITED = f"{SOURCE_TYPE}compositeWithTrainedAlgorithmicMedia"  # an input, edited by generative AI
GENERATED = f"{SOURCE_TYPE}trainedAlgorithmicMedia"  # made by it alone
SOFTWARE = f"csd_exp {version('csd_exp')}"


@dataclass(frozen=True)
class Origin:
    """How a run makes pictures.

    source_type: EDITED or GENERATED. model: the name of the prior. weights: its fingerprint. record: whatever
    else is to be told: settings, checksums of inputs, the commit; never a path, as files go further than
    folders.
    """

    source_type: str
    model: str
    weights: str
    negative_prompt: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)

    def of_made(self, prompt: str, step: int, sphere: Mapping[str, str]) -> Label:
        """The label of what the model has made after so many steps, or of what shows it.

        XMP has IPTC's Digital Source Type and its properties for generative AI (IPTC Photo Metadata 2025.1),
        the comment all of it as JSON. sphere: GPano properties of a 360-degree picture.
        """
        negative = f" (negative: {self.negative_prompt})" if self.negative_prompt else ""
        properties = {
            "xmp:CreatorTool": SOFTWARE,
            "Iptc4xmpExt:DigitalSourceType": self.source_type,
            "Iptc4xmpExt:AISystemUsed": self.model,
            "Iptc4xmpExt:AISystemVersionUsed": f"{self.weights}, by {SOFTWARE}",
            "Iptc4xmpExt:AIPromptInformation": f"{prompt}{negative}",
        }
        record = {
            "software": SOFTWARE,
            "digital_source_type": self.source_type,
            "model": self.model,
            "weights": self.weights,
            "prompt": prompt,
            "step": step,
            **self.record,
        }
        return Label(SOFTWARE, packet(properties | spheres.properties(sphere)), json.dumps(record))

    def of_input(self, sphere: Mapping[str, str]) -> Label:
        """The label of an input as it was read: no model has touched it, and where it is from is unknown."""
        properties = {"xmp:CreatorTool": SOFTWARE} | spheres.properties(sphere)
        record = {"software": SOFTWARE, "shows": "an input of the run"}
        return Label(SOFTWARE, packet(properties), json.dumps(record))


def of_figure(about: str) -> Label:
    """The label of a figure that shows pictures of runs. about: its caption, which says what these are."""
    properties = {
        "xmp:CreatorTool": SOFTWARE,
        "Iptc4xmpExt:DigitalSourceType": EDITED,
        "Iptc4xmpExt:AIPromptInformation": about,
    }
    record = {"software": SOFTWARE, "digital_source_type": EDITED, "shows": about}
    return Label(SOFTWARE, packet(properties), json.dumps(record))


class Untold(Origin):
    """Says nothing but what the picture needs to be shown rightly."""

    def __init__(self):
        super().__init__("", "", "")

    def of_made(self, prompt: str, step: int, sphere: Mapping[str, str]) -> Label:
        return self.of_input(sphere)

    def of_input(self, sphere: Mapping[str, str]) -> Label:
        return Label(xmp=packet(spheres.properties(sphere)))
