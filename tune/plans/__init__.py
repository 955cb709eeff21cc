"""Plans of studies: sweeps, ablations and their arms, and the detection of settings without effect."""
