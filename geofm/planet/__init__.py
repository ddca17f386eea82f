"""The embedded planet: a procedural Earth behind a STAC API on loopback, for demos and tests.

    scenes.py    the plan of a world: tiles, overpasses, products
    scenery/     the ground at any point: relief, rivers, fields, towns, reflectance on a date
    sensors.py   from the ground to pixels: clouds, blur, noise, counts, class layer
    world.py     `build_world`: render all scenes to COGs, items and a truth file
    cases.py     duplicates and overlaps that a plan contains, as truth for tests
    catalog/     COG files, STAC items, and the server: `serve_world`, `serving_source`
    labelled.py  `planet_task`: a land-cover task on ground that no scene shows
    preview.py   a picture of all scenes

The planet uses other rooms, for example their types; no other room imports it. The flows start its
server (`catalog.serving.serving_source`) and hand its task to evaluation through `geofm.stages`.
A seed, a plan and ``scenes.VERSION`` determine every byte of a world.
"""
