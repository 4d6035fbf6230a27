"""The Barlow Twins loss, exact for any batch size, width and number of ranks.

With `A` and `B` the embeddings of the two views, each feature normalised over the global batch, and
`C = A^T B / N` their cross-correlation matrix (Zbontar et al. 2021, Algorithm 1):

    loss = scale * (sum_i (1 - C_ii)^2  +  lambd * sum_{i != j} C_ij^2)
                    invariance                     redundancy

`sum_ij C_ij^2` equals `<A A^T, B B^T> / N^2`, so a batch with fewer samples than features never
needs the `(D, D)` matrix. Both forms give the same number; the cheaper one is computed.
"""

from barlow.loss.correlation import cross_correlation, mixed_barlow_twins_regulariser
from barlow.loss.criterion import BarlowTwinsLoss, Terms

__all__ = ["BarlowTwinsLoss", "Terms", "cross_correlation", "mixed_barlow_twins_regulariser"]
