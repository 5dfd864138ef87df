"""Log-linear attention with a scalar gate: see lasp.kernels.triton.

A segment is cut into *leaves* at positions within its document that the leaf's length divides, and these are the leaves
of a binary tree over positions. In a leaf tokens see each other pair by pair (levels up to log2 of its length). What a
query sees of earlier leaves at one level is one node of the tree: the left sibling of the node of that height that the
query lies in. So every pair of siblings stands for one state, that of its left node, which all queries of its right
node read with a decay of their own: T / leaf states in all, whatever the number of levels.

    forward    states of leaves -> merged level by level (merging) -> outputs (reads)
    backward   the same states again -> gradients of the left nodes' states from the queries of the right nodes
               (node_grads) -> handed down level by level (merging) -> dk, dv (writes); dq and dλ (reads); dg (gates)

Names: M leaves, P pairs, heights 0 … of nodes, the leaves' being 0. A leaf's `first` and `stop` say at which of its
places there are tokens, `index` where it stands in its document.
"""
