"""Data sets: images are uint8 on disk and [-1, 1] inside, points in the plane are drawn."""
