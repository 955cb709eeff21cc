"""The diffusion model as a policy: noise schedules, the Gaussian transition, trajectories, and solvers."""
