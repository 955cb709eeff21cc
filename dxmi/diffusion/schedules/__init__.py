"""Noise schedules: the forward process of pretraining, and the tables of the T policy steps.

One module for each family of models:

    ddpm    DDPM's 1000 steps (arXiv 2006.11239), shortened as in FastDPM (2106.00132); the network predicts the noise
    edm     EDM's noise levels (2206.00364) with ancestral steps; the network has EDM's preconditioning
    ddgan   the T steps of a denoising-diffusion GAN (2112.07804); the network predicts the image

In all families the mean of a policy step is linear in the state and in the network's output, so that one table of
coefficients serves all three. Everything here is computed once, in float64, since the fractional diffusion step of a
noise level is inaccurate in float32.

Letters: K = 1000 diffusion steps, k a (possibly fractional) diffusion step, T policy steps, t = 0 is noise.
gbar_s is the signal level after s of the T noising steps, so gbar_0 = 1 and gbar_T is the noisiest.
"""
