"""An image's list of parts, as CycloneDX 1.6 JSON (cyclonedx.org/docs/1.6/json)."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Iterator

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from deploy.image import Image


def render_sbom(image: Image) -> bytes:
    """List the Python and Debian packages of an image; the same image has the same bytes.

    Licences are not in it: each package in the image carries its own.
    """
    whole = Component(
        name=image.reference.split("@")[0].rsplit(":", 1)[0],
        version=image.id,
        type=ComponentType.CONTAINER,
        bom_ref="image",
    )
    bom = Bom(
        components=_list_components(image),
        # The image's own id and time: a clock or a random number would make each list another.
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, image.id),
    )
    bom.metadata.component = whole
    bom.metadata.timestamp = _read_time(image.created)
    bom.register_dependency(whole, bom.components)
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def _list_components(image: Image) -> Iterator[Component]:
    for kind, namespace, packages in (
        ("pypi", None, image.python),
        ("deb", "debian", image.debian),
    ):
        for name, version in packages.items():
            url = PackageURL(type=kind, namespace=namespace, name=name, version=version)
            yield Component(
                name=name,
                version=version,
                type=ComponentType.LIBRARY,
                purl=url,
                bom_ref=url.to_string(),
            )


def _read_time(text: str) -> datetime.datetime:
    """A moment as Docker writes it, with nanoseconds, to the second."""
    return datetime.datetime.fromisoformat(re.sub(r"\.\d+", "", text).replace("Z", "+00:00"))
