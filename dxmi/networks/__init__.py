"""Networks. A new kind is a config class in `configs`, a module here, and a line in `registry` for each of its roles.

Two interfaces, so that everything above knows no architecture:

    denoiser: embed(steps [N]) -> [N, E];  forward(x [B, *event], embedding [1 or B, E]) -> like x
    critic:   forward(x [B, *event]) -> [B], or the same `embed` and `forward(x, embedding) -> [B]` if it knows time

`embed` is separate from `forward` so that the T embeddings of a rollout are computed once, not once a state. A forward
is a pure function of weights and arguments: whatever it needs at random is handed to it.
"""
