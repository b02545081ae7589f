"""Subspaces of a weight's input space: bases, residual directions and minor directions.

Pure functions on tensors: no model, no file, no process group. Every function takes any floating dtype and
returns float32 on the device of its input, whatever the TF32 and autocast settings are. The result is
deterministic, and the sign of a direction is fixed: its entry of largest magnitude is positive, so that inputs
which differ by rounding give the same directions.

One rule says how: a matrix whose smaller side is at most `linalg.LARGE` is decomposed in float64. A larger one is
first tried by products in float32 (`krylov`), which give a few directions and check them; where that does not
converge, the eigenvectors of the smaller Gram matrix are taken, as for small ones. `minor_basis`, which needs the
smallest directions, and `truncate_spectrum` are always float64.
"""

from llava_cl.subspace.bases import expand_basis, orthonormal, principal_basis, truncate_spectrum
from llava_cl.subspace.linalg import full_precision
from llava_cl.subspace.minor import minor_basis
from llava_cl.subspace.residual import ResidualDirections, residual_directions
from llava_cl.subspace.sketch import Sketch, sketch_shapes

__all__ = [
    "ResidualDirections",
    "Sketch",
    "expand_basis",
    "full_precision",
    "minor_basis",
    "orthonormal",
    "principal_basis",
    "residual_directions",
    "sketch_shapes",
    "truncate_spectrum",
]
