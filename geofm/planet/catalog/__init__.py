"""The planet as an archive: its site, COG files, STAC items, item search and server."""
