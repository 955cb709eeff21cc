"""The search space, the samplers that propose points in it, and the pruners that stop trials early."""
