"""A softmax model made linear: `lasp import --distill` (LoLCATs, arXiv:2410.10254; LAWCAT, arXiv:2509.18467)."""
