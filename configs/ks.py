"""Kuramoto–Sivashinsky, 8×: biased coarse fields on 24 points -> fine fields on 192 points.

The experiment of Wan et al. 2023, section 5. Only what differs from the defaults stands here; all
keys with their meanings: docs/reference/config.md.

  --config=ks             quick: minutes on two cores
  --config=ks:full        the figures of docs/results/ks
  --config=ks:smoke       every job in a minute or two; its scores mean nothing
  --config=ks:stationary  quick with a burn-in of 100. At the paper's 25, KS is still a transient:
                          the variance is 1.23 at t = 25, 1.55 at 37.5, 1.72 from about 75 on.
  --config=ks:series      16× in time: every 16th point of 16 consecutive snapshots, 1 unit apart
"""

import ml_collections

# An N of the recipe takes some seconds. The last M mends what they disturb of the moments.
FULL = dict(debias=dict(recipe="GMQMNNNNNNNNNNNNM"))
QUICK = dict(
  data=dict(
    snapshots=2,
    shard=512,
    hfhr=dict(train=6144, calibration=512, test=512, floor=2048),
    lflr=dict(train=4096, calibration=512),
  ),
  debias=dict(points=8192, threshold=2e-3, max_iterations=1000, recipe="GMQMNNNNM"),
  optimizer=dict(warmup_steps=100),
  train=dict(total_steps=600, ema_decay=0.995),
  plan=dict(log_every=50, eval_every=500, save_every=500),
  watch=dict(fields=64, steps=16),
  sampling=dict(conditions=256, unconditional=dict(fields=256, steps=32)),
  evaluate=dict(reference=8192),
)
SMOKE = dict(
  data=dict(
    shard=64,
    hfhr=dict(train=128, calibration=64, test=64, reference=32, floor=32),
    lflr=dict(train=128, calibration=32, test=64),
  ),
  debias=dict(
    points=256, epsilon=0.01, max_iterations=100, minibatch=dict(batch=32), held_out=64
  ),
  model=dict(channels=(8, 16), strides=(2, 4), embedding=32),
  optimizer=dict(warmup_steps=2),
  train=dict(batch=16, total_steps=20, ema_decay=0.9),
  plan=dict(log_every=5, eval_every=10, save_every=10),
  watch=dict(fields=8, steps=4),
  sampling=dict(
    conditions=16,
    members=2,
    unit=(8, 2),
    resample=dict(strength=0.0),
    levels=dict(steps=4),
    unconditional=dict(fields=16, steps=8),
  ),
  evaluate=dict(reference=128, draws=40),
)
STATIONARY = dict(data=dict(burn_in=100.0))
# At every 8th point one snapshot determines the field, and time adds little: hence 16. The field
# decorrelates within about 8 units. Resampling acts on χ², which grows with the number of coarse
# values: off. The Gaussian guess knows each frame alone, so the first σ is one at which what frames
# know of each other is still to come.
SERIES = dict(
  experiment="ks-16x-series",
  grid=dict(factor=16, frames=8),
  data=dict(
    spacing=1.0,
    snapshots=16,
    hfhr=dict(train=4096, reference=512, floor=512),
    lflr=dict(calibration=256, test=512),
  ),
  debias=dict(maps=("gaussian", "equivariant")),
  sampling=dict(
    conditions=64,
    unit=(16, 8),
    series=dict(frames=16, overlap=4),
    resample=dict(strength=0.0),
    solver=dict(eta=5.0),
    levels=dict(name="edm", steps=32, sigma_max=10.0),
    unconditional=dict(fields=64),
  ),
)
VARIANTS = {
  "quick": (QUICK,),
  "full": (FULL,),
  "smoke": (SMOKE,),
  "series": (QUICK, SERIES),
  "stationary": (QUICK, STATIONARY),
}


def get_config(variant="quick"):
  if variant not in VARIANTS:
    known = ", ".join(f":{name}" for name in VARIANTS)
    raise ValueError(f"configs/ks.py:{variant} is unknown; use one of {known}.")
  config = ml_collections.ConfigDict()
  for blocks in VARIANTS[variant]:
    config.update(blocks)
  return config
