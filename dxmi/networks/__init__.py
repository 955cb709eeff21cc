"""Networks. A new kind is a config class in `configs`, a module here, and a line in `registry` for each of its roles.

All other packages rely on two interfaces only, and never on an architecture:

    denoiser: embed(steps [N]) -> [N, E];  forward(x [B, *event], embedding [1 or B, E]) -> like x
    critic:   forward(x [B, *event]) -> [B]; if time-conditioned, `embed` as above and forward(x, embedding) -> [B]

`embed` is separate from `forward` so that the T embeddings of a rollout are computed once rather than once per state.
`forward` is a pure function of the weights and its arguments: any randomness that it needs is passed in.
"""
