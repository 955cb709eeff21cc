"""Data sets: images, stored as uint8 and converted to [-1, 1], and points drawn from distributions in the plane."""
