"""The embedded default: a small procedural Earth as COGs behind a real STAC API on loopback."""
