"""Kolmogorov flow, vorticity on the plane: biased coarse fields -> fine turbulence.

The experiment of Wan et al. 2023, section 5. Only what differs from the defaults stands here; all
keys with their meanings: docs/reference/config.md.

  --config=kolmogorov        cpu: 128² -> 32², what two cores can do in 3 hours. With
                             --config.grid.factor=8 in another --workdir: 128² -> 16²
  --config=kolmogorov:8x     256² -> 32², for accelerators; planned and compiled, not trained
  --config=kolmogorov:16x    256² -> 16², likewise
  --config=kolmogorov:smoke  every job in minutes; its scores mean nothing

`cpu`, 96 conditions: MELRw .031 (floor .032), symcov .106 (.108), spread over error .98; the map at
32²: symcov .039 (.058), corr(y, T y) .936; see docs/results/kolmogorov.
"""

import ml_collections

# An M of the recipe is limited to small moves: several are needed. Each disturbs the covariance a
# little, which the G after it mends. Without the forcing the network cannot tell y from y + π/4.
# Resampling is off: with .125 ensembles of `cpu` become too narrow.
FLOW = dict(
  data=dict(name="kolmogorov", burn_in=40.0),
  debias=dict(
    maps=("entropic", "gaussian", "equivariant"), epsilon=3e-4, recipe="GMQGMMGMG"
  ),
  model=dict(preconditioning="adaptive", static=("forcing",)),
  sampling=dict(resample=dict(strength=0.0), levels=dict(name="edm")),
  evaluate=dict(draws=100),
)
# The field keeps .06 of itself after 3 time units. Blocks run from 64² down to 8².
REAL = dict(
  experiment="kolmogorov-8x",
  grid=dict(points=256),
  fine=dict(dt=0.005),
  data=dict(
    spacing=3.0,
    snapshots=128,
    shard=32,
    hfhr=dict(train=512, calibration=48, test=64, reference=32, floor=32),
    lflr=dict(train=512, calibration=48, test=64),
  ),
  debias=dict(points=65536),
  model=dict(
    channels=(64, 128, 256, 512),
    strides=(2, 2, 2, 2),
    blocks=2,
    stem=2,
    heads=8,
    embedding=256,
    dtype="bfloat16",
  ),
  optimizer=dict(peak=5e-4, warmup_steps=2000),
  train=dict(batch=256, total_steps=200_000, ema_decay=0.9999),
  plan=dict(eval_every=5000),
  sampling=dict(members=16, unit=(16, 16)),
  evaluate=dict(reference=4096),
)
SIXTEEN = dict(experiment="kolmogorov-16x", grid=dict(factor=16))
# The field keeps .12 of itself after 2 time units. A random symmetry moves every field in training,
# as there are few. `noise` makes up for small scales that the network takes away with the noise; it
# was fitted on calibration fields (1.1 for a factor of 8).
CPU = dict(
  experiment="kolmogorov-4x-proxy",
  grid=dict(points=128, factor=4),
  data=dict(
    spacing=2.0,
    snapshots=96,
    shard=16,
    hfhr=dict(train=64, calibration=16, test=24, reference=24, floor=24),
    lflr=dict(train=192, calibration=16, test=64),
  ),
  debias=dict(points=6144, held_out=2048),
  model=dict(channels=(64, 96, 128), strides=(1, 2, 2), stem=4),
  optimizer=dict(peak=1e-3, warmup_steps=300),
  train=dict(batch=16, total_steps=6000, augment=True),
  plan=dict(log_every=50, eval_every=1000, save_every=500),
  watch=dict(fields=32, steps=16),
  sampling=dict(
    conditions=192,
    members=4,
    unit=(16, 4),
    solver=dict(noise=1.06),
    unconditional=dict(fields=256, steps=32),
  ),
  evaluate=dict(reference=2304),
)
SMOKE = dict(
  experiment="smoke",
  grid=dict(points=64, factor=2),
  fine=dict(dt=0.02),
  data=dict(
    burn_in=4.0,
    spacing=1.0,
    shard=8,
    hfhr=dict(train=16, calibration=16, test=8, reference=8, floor=8),
    lflr=dict(train=16, calibration=8, test=8),
  ),
  debias=dict(
    points=64,
    epsilon=0.01,
    max_iterations=100,
    recipe="GQG",
    minibatch=dict(batch=32),
    held_out=16,
  ),
  model=dict(channels=(8, 16), strides=(2, 2), stem=2, embedding=32),
  optimizer=dict(peak=1e-3, warmup_steps=2),
  train=dict(batch=8, total_steps=4, ema_decay=0.9),
  plan=dict(log_every=2, eval_every=4, save_every=2),
  watch=dict(fields=8, steps=4),
  sampling=dict(
    conditions=8,
    members=2,
    unit=(4, 2),
    levels=dict(steps=4),
    unconditional=dict(fields=8, steps=4),
  ),
  evaluate=dict(reference=32, draws=40),
)
VARIANTS = {
  "8x": (FLOW, REAL),
  "16x": (FLOW, REAL, SIXTEEN),
  "cpu": (FLOW, CPU),
  "smoke": (FLOW, SMOKE),
}


def get_config(variant="cpu"):
  if variant not in VARIANTS:
    known = ", ".join(f":{name}" for name in VARIANTS)
    raise ValueError(f"configs/kolmogorov.py:{variant} is unknown; use one of {known}.")
  config = ml_collections.ConfigDict()
  for blocks in VARIANTS[variant]:
    config.update(blocks)
  return config
