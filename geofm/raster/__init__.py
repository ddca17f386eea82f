"""From an asset to pixels on a grid.

    reader.py       an asset as a raster: read whole or in ranges, by GDAL or by tiff.py
    tiff.py         the plain layouts of TIFF, without GDAL
    scene.py        the bands of an item, opened and checked, on one grid
    grid.py         the grid of cells, and transformations between CRS
    windows.py      a window of all bands as counts: resampling, offset, measurements
    resample.py     all resampling that more than one room uses
    radiometry.py   from counts to unit pixels and pictures

Stage `cut` uses `scene`, `windows` and `grid`. Later stages use `radiometry` and `resample` only.
"""
