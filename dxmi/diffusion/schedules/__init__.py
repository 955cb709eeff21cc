"""Noise schedules: how pretraining noises data, and the tables of the T policy steps that the model is cut to.

One module for each family of models:

    ddpm    DDPM's 1000 steps (arXiv 2006.11239), cut by FastDPM (2106.00132); the network predicts the noise
    edm     EDM's noise levels (2206.00364) with ancestral steps; the network is preconditioned as theirs
    ddgan   the T steps of a denoising-diffusion GAN (2112.07804); the network predicts the image

Whatever it predicts, the mean of a policy step is linear in the state and in the network's output, so that one table of
coefficients serves all three. Everything here is computed once, in float64: in float32 the continuous diffusion step is
wrong.

Letters: K = 1000 diffusion steps, k a (possibly fractional) diffusion step, T policy steps, t = 0 is noise.
gbar_s is the signal level after s of the T noising steps, so gbar_0 = 1 and gbar_T is the noisiest.
"""
