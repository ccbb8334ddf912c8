"""The gate on compiled kernels that needs no GPU: `mmopt kernels`.

`mmopt_kernels.inspection` compiles and counts. `rules` is what always has to hold, `baseline` what
was recorded and how a run is held against it, `gate` the command's three runs and their report.
"""
