"""Training: the loop, its optimiser, checkpoints, metrics, recipes, and what is done with a trained model."""
