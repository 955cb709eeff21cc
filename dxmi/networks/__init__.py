"""Networks. A new kind needs a config class in `configs`, a module, and a line in `registry` for each of its roles.

All other packages use two interfaces and do not depend on an architecture:

    denoiser: embed(steps [N]) -> [N, E];  forward(x [B, *event], embedding [1 or B, E]) -> like x
    critic:   forward(x [B, *event], labels) -> [B]; time-conditioned: embed and forward(x, embedding, labels) -> [B]

`embed` is separate from `forward` so that the T embeddings of a rollout are computed once, not once per state.
`forward` is a pure function of the weights and its arguments: any randomness that it needs is passed in.
"""
