"""Running trials: the controller, its Ray backend, resources, cost estimates, and jobs on a cluster."""
