"""What the operations share: classes of decay, rows of tiles, and passing states from tile to tile."""
