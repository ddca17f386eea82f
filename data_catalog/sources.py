"""Source profiles: what is known about a catalogue's collections that their items do not say.

A profile names the licence, how an item's identity is told (which acquisition, which tile, which
processing), where each band and the cloud layer lie, and whether assets must be signed. Profiles
are YAML files in ``data_catalog/sources``; the one called ``generic`` fits everything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from license_expression import get_spdx_licensing
from pydantic import BaseModel, ConfigDict, Field, field_validator

PROFILES = Path(__file__).parent / "sources"
_LICENCE_REF = re.compile(r"^LicenseRef-[A-Za-z0-9.-]+$")


class Profile(BaseModel):
    """Base of the parts of a profile: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cloud(Profile):
    """The layer that marks clouds: classes of a map, or bits of a quality band.

    Attributes:
        asset: asset key of the layer.
        codes: ``classes`` when a pixel's value is its class, ``bits`` when each bit is a flag.
        cloud: classes or bit numbers that mean cloud (cirrus included).
        shadow: classes or bit numbers that mean cloud shadow.
    """

    asset: str
    codes: Literal["classes", "bits"] = "classes"
    cloud: tuple[int, ...]
    shadow: tuple[int, ...] = ()


class Identity(Profile):
    """How two items are recognised as the same acquisition of the same tile.

    Attributes:
        acquisition: properties that together name the acquisition; all must be there.
        strip: regular expression removed from the acquisition (what a reprocessing changes).
        tile: the first of these properties that is there names the tile.
        version: properties that hold the processing version, the first that is there counts.
        generated: the same for the time of processing.
        sequence: properties that differ between two receptions of one acquisition.
        product: property with the provider's own name of the product.
    """

    acquisition: tuple[str, ...] = ()
    strip: str = ""
    tile: tuple[str, ...] = ("grid:code",)
    version: tuple[str, ...] = ("processing:version", "version")
    generated: tuple[str, ...] = ("created",)
    sequence: tuple[str, ...] = ()
    product: str = ""

    @field_validator("strip")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class BaselineOffset(Profile):
    """An offset that the provider does not state: from ``since`` on, ``counts`` is added.

    Used only where neither the asset nor the item says anything about an offset.
    """

    property: str
    since: str
    counts: int


class Source(Profile):
    """What is known about some collections of an API.

    Attributes:
        api: patterns (``*`` matches anything) of the API's address.
        collections: patterns of collection ids; earlier files and exact names win.
        licence: SPDX id or expression, or a ``LicenseRef-`` where SPDX has none.
        bands: asset key by common name, where the assets do not tell.
        default_scale: reflectance per count where the asset states none.
        default_nodata: value of pixels without data where neither file nor item states one.
        offset_applied: boolean property that says the stated offset is in the pixels already.
        sign: URL that signs ``{href}``; ``{api}`` stands for the API's address.
        sign_when: ``always``, or ``refused`` to sign only what answers 401 or 403.
    """

    name: str
    title: str
    provider: str
    api: tuple[str, ...] = ("*",)
    collections: tuple[str, ...] = ("*",)
    licence: str
    licence_url: str = ""
    attribution: str = ""
    bands: dict[str, str] = Field(default_factory=dict)
    cloud: Cloud | None = None
    identity: Identity = Identity()
    default_scale: float | None = Field(None, gt=0)
    default_nodata: float | None = None
    offset_applied: str = ""
    baseline_offset: BaselineOffset | None = None
    sign: str = ""
    sign_when: Literal["always", "refused"] = "refused"
    notes: str = ""

    @field_validator("licence")
    @classmethod
    def _known_licence(cls, licence: str) -> str:
        if spdx_licence(licence) is None:
            raise ValueError(f"{licence!r} is neither an SPDX expression nor a LicenseRef- id")
        return licence

    def covers(self, api: str, collection: str) -> bool:
        """Whether the profile is meant for a collection of the API at ``api``."""
        address = api.rstrip("/")
        return any(fnmatchcase(address, pattern) for pattern in self.api) and any(
            fnmatchcase(collection, pattern) for pattern in self.collections
        )


def spdx_licence(text: Any) -> str | None:
    """The licence as SPDX writes it, or None when it is neither SPDX nor a ``LicenseRef-``.

    STAC's ``proprietary``, ``various`` and ``other`` are no licences and give None.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > 200:
        return None
    licence = text.strip()
    if _LICENCE_REF.match(licence):
        return licence
    info = _licensing().validate(licence)
    return None if info.errors else str(info.normalized_expression)


@cache
def _licensing() -> Any:
    return get_spdx_licensing()


@cache
def load_sources() -> tuple[Source, ...]:
    """All profiles in the order in which they are asked: by file name, ``generic`` last.

    A file holds either one profile or a list of them under ``sources``.
    """
    found: list[Source] = []
    for path in sorted(PROFILES.glob("*.yaml"), key=lambda p: (p.stem == "generic", p.stem)):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found += [Source.model_validate(profile) for profile in content["sources"]]
    return tuple(found)


def source_for(api_url: str, collection: str) -> Source:
    """The first profile that covers the collection; ``generic`` covers everything.

    Args:
        api_url: address of the STAC API, or ``planet``.
        collection: collection id.
    """
    return next(source for source in load_sources() if source.covers(api_url, collection))


def source_named(name: str) -> Source:
    """The profile with this name, ``generic`` where it is gone."""
    by_name = {source.name: source for source in load_sources()}
    return by_name.get(name, by_name["generic"])


def count_sources(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by source profile and licence, with the attribution that the profile asks for."""
    numbers = Counter((str(row["source"]), str(row["licence"])) for row in rows)
    return [
        {
            "source": name,
            "licence": licence,
            "rows": number,
            "attribution": source_named(name).attribution,
        }
        for (name, licence), number in sorted(numbers.items())
    ]
