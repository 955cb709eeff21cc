"""Drawing samples, scoring them, and the training-free samplers that they are compared with."""
