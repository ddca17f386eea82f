"""The ground of the planet as a function of world coordinates.

``noise`` and ``mosaic`` are tools. ``terrain``, ``fields`` and ``network`` are computed once per
world. ``waters``, ``farms`` and ``built`` give the surfaces at points, ``landcover`` puts them
together, and ``reflectance`` with ``spectra`` gives their colour on a date.
"""
