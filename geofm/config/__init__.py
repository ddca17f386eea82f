"""The settings of a run and the checks that can be made before it starts.

    recipe.py        `Recipe` and its sections, one per stage
    recipe_book.py   `load_recipe`: recipes by name or file, overrides, messages
    area.py          the area of a search; areas across the antimeridian
    credentials.py   secrets in the address of a catalogue, as references ${NAME}
    recipes/         the recipes that come with geofm

`recipe` imports neither numpy nor shapely, so the command line starts quickly.
"""
