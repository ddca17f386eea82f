"""The plan of a world: tiles on the ground, overpasses in time, and their products.

Tiles hold whole cells of 1280 m (128 pixels of 10 m) of their CRS plus 16 pixels, so that chips on
that grid lose little. Some products repeat others, as in a real archive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from data_catalog.hashing import digest_of

#: Changes when the same seed gives a different world.
VERSION = "2"
#: Pixels of a tile beyond its whole cells.
RIM = 16


@dataclass(frozen=True)
class Tile:
    """A square of ground that a sensor delivers.

    Attributes:
        name: Name of five characters, e.g. 31TXA (zone, band, and a square that does not exist
            on Earth).
        epsg: EPSG code of its CRS.
        column, row: South-west cell, counted in cells from the CRS origin.
        cells: Whole cells per edge.
        shift: Even numbers of pixels by which the west and south edges lie outside the cells, 0 to
            RIM.
        about: Description of the scenery.
        gsd: Pixel edge in metres.
        cell_px: Pixels per cell edge.
    """

    name: str
    epsg: int
    column: int
    row: int
    cells: int
    shift: tuple[int, int]
    about: str
    gsd: float = 10.0
    cell_px: int = 128

    @property
    def size(self) -> int:
        """The edge in pixels."""
        return self.cells * self.cell_px + RIM

    @property
    def west(self) -> float:
        """The left edge in the CRS."""
        return (self.column * self.cell_px - self.shift[0]) * self.gsd

    @property
    def north(self) -> float:
        """The upper edge in the CRS."""
        return (self.row * self.cell_px - self.shift[1] + self.size) * self.gsd

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """West, south, east and north in the CRS."""
        edge = self.size * self.gsd
        return self.west, self.north - edge, self.west + edge, self.north


@dataclass(frozen=True)
class Take:
    """An overpass, with the conditions that all its tiles share.

    Attributes:
        name: Name of the overpass in the plan.
        moment: Start of the datatake.
        satellite: S2A, S2B or the name of an aircraft.
        orbit, relative_orbit: Orbit numbers.
        clouds: Share of the sky that is covered.
        cumulus: Small clouds instead of a deck.
        drought: Dryness of the vegetation, 0 to 1.
    """

    name: str
    moment: datetime
    satellite: str
    orbit: int
    relative_orbit: int
    clouds: float = 0.0
    cumulus: bool = True
    drought: float = 0.0

    @property
    def day(self) -> float:
        """The day of the year."""
        return float(self.moment.timetuple().tm_yday)

    @property
    def key(self) -> int:
        """The key of its clouds and noise."""
        return int(digest_of(["take", self.name])[:6], 16)


@dataclass(frozen=True)
class Product:
    """A delivery of a tile.

    Attributes:
        tile, take: Names of the tile and the overpass.
        baseline: Processing baseline; from 04.00 on, 1000 is added to counts.
        made: Days from the overpass to the processing.
        sequence: 0, or 1 for the copy of a second receiving station.
        station: Receiving station of the datastrip.
        swath: Share of the tile, from the west, that the sensor's swath covers; None for all.
    """

    tile: str
    take: str
    baseline: str = ""
    made: float = 0.4
    sequence: int = 0
    station: str = "2APS"
    swath: float | None = None


@dataclass(frozen=True)
class Plan:
    """All scenes of a world: satellite and aerial tiles, overpasses, and products of both."""

    tiles: tuple[Tile, ...]
    aerial: tuple[Tile, ...]
    takes: tuple[Take, ...]
    products: tuple[Product, ...]
    flights: tuple[Product, ...] = field(default=())

    @property
    def digest(self) -> str:
        """The digest of the plan."""
        return digest_of([VERSION, repr(self)])


def _take(
    name: str, when: str, satellite: str, orbit: int, track: int, clouds: float = 0.0,
    cumulus: bool = True, drought: float = 0.0,
) -> Take:  # fmt: skip
    """Make an overpass from the text of its time (UTC)."""
    moment = datetime.fromisoformat(when).replace(tzinfo=UTC)
    return Take(name, moment, satellite, orbit, track, clouds, cumulus, drought)


TAKES = (
    _take("spring", "2024-04-28T10:40:21", "S2A", 46232, 8),
    _take("summer", "2024-07-20T10:36:29", "S2B", 38506, 8, drought=0.35),
    _take("autumn", "2023-10-16T10:50:31", "S2A", 43458, 51, clouds=0.16),
    _take("winter", "2022-02-08T10:51:49", "S2B", 25726, 51),
    _take("older", "2021-06-03T10:40:21", "S2A", 31061, 8, clouds=0.04),
    _take("overcast", "2023-08-24T10:46:29", "S2B", 33759, 51, 0.55, cumulus=False, drought=0.5),
)
FLIGHTS = (
    _take("flight-june", "2023-06-18T09:55:00", "aircraft-1", 0, 0),
    _take("flight-march", "2022-03-24T10:20:00", "aircraft-2", 0, 0),
)
#: Baseline of processing at the time of each overpass.
BASELINES = {
    "spring": "05.10", "summer": "05.10", "autumn": "05.09", "winter": "04.00", "older": "03.00",
    "overcast": "05.09",
}  # fmt: skip

TILES = (
    Tile("31TXA", 32631, 557, 3902, 5, (8, 4), "coast, harbour town and estuary"),
    Tile("31TXB", 32631, 555, 3911, 5, (2, 12), "open sea with a strip of coast"),
    Tile("31TXC", 32631, 561, 3912, 5, (6, 6), "river plain and pastures"),
    Tile("31TXD", 32631, 565, 3894, 5, (0, 10), "farmland"),
    Tile("31TXE", 32631, 568, 3894, 5, (4, 10), "farmland, next to 31TXD and overlapping it"),
    Tile("31TXF", 32631, 569, 3909, 5, (12, 2), "the city"),
    Tile("31TXG", 32631, 574, 3905, 5, (10, 8), "lake, reeds and foothills"),
    Tile("32TXA", 32632, 207, 3906, 5, (6, 4), "the same lake from the next UTM zone"),
    Tile("32TXB", 32632, 220, 3909, 5, (14, 0), "mountains"),
    Tile("32TXC", 32632, 223, 3890, 5, (8, 8), "dunes"),
    Tile("31TXH", 32631, 581, 3915, 5, (4, 14), "wooded hills"),
    Tile("31TXJ", 32631, 580, 3894, 5, (0, 6), "irrigated rim of the desert"),
)
_DATES = {
    "31TXA": ("spring", "summer", "autumn"), "31TXB": ("spring", "winter"),
    "31TXC": ("summer", "winter"), "31TXD": ("spring", "summer", "autumn"),
    "31TXE": ("spring", "summer"), "31TXF": ("spring", "winter", "older"),
    "31TXG": ("summer", "autumn"), "32TXA": ("summer", "autumn"),
    "32TXB": ("summer", "winter"), "32TXC": ("summer", "winter"),
    "31TXH": ("spring", "autumn"), "31TXJ": ("spring", "summer", "overcast"),
}  # fmt: skip


def _aerial(name: str, x: float, y: float, about: str, epsg: int = 32631) -> Tile:
    """Make an aerial tile of 4 × 4 cells of 320 m with its south-west cell near a point."""
    shift = (2 * (int(name[-2:]) % 7), 2 * (int(name[-2:]) * 3 % 8))
    return Tile(name, epsg, round(x / 320), round(y / 320), 4, shift, about, gsd=2.5)


AERIAL = (
    _aerial("A01", 731_400, 5_006_800, "inner city"),
    _aerial("A02", 729_300, 4_985_200, "village and fields"),
    _aerial("A03", 716_800, 4_997_400, "harbour town"),
    _aerial("A04", 745_500, 5_014_500, "forest"),
    _aerial("A05", 735_400, 5_000_300, "lake shore"),
    _aerial("A06", 745_200, 4_985_600, "irrigated land"),
)


def default_plan() -> Plan:
    """Return the default plan: 30 satellite products of 12 tiles, 7 aerial products of 6 tiles."""
    products = [
        Product(tile.name, take, BASELINES[take])
        for tile in TILES
        for take in _DATES[tile.name]
        if (tile.name, take) != ("31TXC", "winter")
    ]
    products.append(Product("31TXC", "winter", "04.00", swath=0.62))
    products.append(Product("31TXF", "older", "05.00", made=830.25))
    products.append(Product("31TXD", "spring", "05.10", made=0.55, sequence=1, station="2BPS"))
    flights = [Product(tile.name, "flight-june") for tile in AERIAL]
    flights.append(Product("A02", "flight-march"))
    return Plan(TILES, AERIAL, TAKES + FLIGHTS, tuple(products), tuple(flights))


def small_plan() -> Plan:
    """Return a plan of a few small scenes with every planted case, for tests."""
    tiles = (
        Tile("31TXD", 32631, 566, 3895, 2, (0, 10), "farmland"),
        Tile("31TXE", 32631, 567, 3895, 2, (4, 10), "farmland, overlapping 31TXD"),
        Tile("31TXG", 32631, 575, 3907, 2, (10, 8), "lake"),
        Tile("32TXA", 32632, 207, 3908, 2, (6, 4), "the same lake from the next UTM zone"),
    )
    products = (
        Product("31TXD", "spring", "05.10"),
        Product("31TXD", "spring", "05.10", made=0.55, sequence=1, station="2BPS"),
        Product("31TXD", "older", "03.00"),
        Product("31TXD", "older", "05.00", made=830.25),
        Product("31TXE", "spring", "05.10"),
        Product("31TXG", "autumn", "05.09", swath=0.6),
        Product("32TXA", "autumn", "05.09"),
    )
    return Plan(tiles, AERIAL[1:2], TAKES + FLIGHTS, products, (Product("A02", "flight-june"),))


def made_at(product: Product, take: Take) -> datetime:
    """Return the time of processing of a product."""
    return take.moment + timedelta(days=product.made)
