"""The mathematics: tensors in, tensors out; no network, no file.

`schedule` says how much signal and noise a time carries, `prediction` converts what networks predict,
`transitions` are the Gaussian steps of few-step samplers, `timesteps` draws noise levels and lays ladders,
`draws` turns (seed, step, role, purpose, sample index) into random numbers.
"""
