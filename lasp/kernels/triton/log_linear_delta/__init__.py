"""Log-linear attention with the delta rule: see lasp.kernels.triton.

The same tree over positions as in `log_linear`, but its leaves are the delta rule's chunks, and a node's transition is
a matrix. Of a leaf with T = (I + L)^{-1} (lasp.kernels.triton.delta.ut_transform), with X what enters it,

    W = T diag(β e^b) K     U = T diag(β) V     R = scale · diag(e^b) Q - F W     P = F T diag(β)     F the scores
    A = e^{b_C} I - K̃ᵀ W    S = K̃ᵀ U            K̃ = diag(e^{b_C - b}) K
    o = (P ⊙ Λ) V + λ R X   X' = A X + S

    forward    terms -> merged level by level (merging) -> outputs (reads): a query sees the left sibling's state at
               each height, by rows R, which then become R A of that sibling
    backward   the same again, with the gradients of rows and levels (query_grads) -> of nodes (node_grads) -> handed
               down level by level (merging) -> of tokens (gradients)

Some heads at a time, since nodes and rows take many times the memory of the inputs. Names as in `log_linear`.
"""
