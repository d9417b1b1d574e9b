"""Objects of an experiment: two worlds, maps, a prior, a sampler.

Jobs and the library make their objects here alone, so that no two of them read a key differently.
"""
