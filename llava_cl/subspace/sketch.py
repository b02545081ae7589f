"""A large matrix from two small random sketches of it, each linear in the matrix.

Tropp, Yurtsever, Udell and Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM J. Matrix
Anal. Appl. 38(4), 2017: of G only G Omega and Psi G are kept, so that a sum of many G is sketched term by term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_cl.subspace.linalg import checked_matrix


def sketch_rows(columns: int) -> int:
    """Rows of Psi for k columns of Omega: 2 k + 1, as the paper recommends."""
    return 2 * columns + 1


def sketch_shapes(rows: int, features: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Shapes of G Omega and Psi G for G `[rows, features]`; None where both together are no smaller than G itself."""
    length = sketch_rows(columns)
    if rows * columns + length * features >= rows * features:
        return None
    return (rows, columns), (length, features)


@dataclass(frozen=True)
class Sketch:
    """Gaussian test matrices that serve all matrices up to a size: each takes their first rows.

    Attributes:
        omega: `[most features, k]` fp32.
        psi: Psi transposed, `[most rows, 2 k + 1]` fp32.
    """

    omega: Tensor
    psi: Tensor

    @classmethod
    def draw(cls, columns: int, rows: int, features: int, generator: torch.Generator) -> Sketch:
        """Test matrices for matrices of at most `rows` x `features`; k = `columns`."""
        omega = torch.randn(features, columns, generator=generator)
        return cls(omega, torch.randn(rows, sketch_rows(columns), generator=generator))

    def to(self, device: torch.device) -> Sketch:
        """The same on a device."""
        return Sketch(self.omega.to(device), self.psi.to(device))

    @torch.no_grad()
    def rebuild(self, range_sketch: Tensor, row_sketch: Tensor) -> Tensor:
        """The approximation of rank k of the sketched matrix: Q (Psi Q)^+ (Psi G), Q a basis of G Omega.

        Section 4 of the paper: the expected squared error is at most 2 (1 + j / (k - j - 1)) times the energy of G
        beyond its j largest directions, for every j < k - 1.

        Args:
            range_sketch: G Omega `[rows, k]`.
            row_sketch: Psi G `[2 k + 1, features]`.

        Returns:
            `[rows, features]` fp32.

        Raises:
            ValueError: NaN or infinite values.
        """
        basis = torch.linalg.qr(checked_matrix("range sketch", range_sketch).double()).Q
        rows = checked_matrix("row sketch", row_sketch).double()
        seen = self.psi[: len(basis)].double().T @ basis
        return (basis @ torch.linalg.lstsq(seen, rows).solution).float()
