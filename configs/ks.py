r"""Kuramoto–Sivashinsky, 8× downscaling: biased coarse 24 points -> 192 points (Wan et al. 2023,
section 5).

Run:       python -m downscaling pipeline --config=configs/ks.py --workdir=runs/ks
Full:      --config=configs/ks.py:full    docs/results/ks has its figures
Smoke:     --config=configs/ks.py:smoke   every job in a minute or two; its scores mean nothing
Stationary: --config=configs/ks.py:stationary   quick with a burn-in of 100, when the field's variance has settled
Series:    --config=configs/ks.py:series  16× in time: every 16th point of 16 consecutive snapshots, 1 time unit apart
"""

import ml_collections

VARIANTS = ("quick", "full", "smoke", "series", "stationary")


def get_config(variant="quick"):
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/ks.py:{variant} is unknown; use one of {', '.join(':' + v for v in VARIANTS)}."
    )

  def pick(quick, full, smoke):
    return {"full": full, "smoke": smoke}.get(variant, quick)

  c = ml_collections.ConfigDict()
  c.experiment = "ks-8x"
  # of another set of samples from the same map and prior: WORKDIR/samples-LABEL,
  # WORKDIR/report-LABEL
  c.label = ""
  c.seed = 0
  # Devices: batches are split over data × fsdp, the state of a training run over fsdp; data=-1
  # takes all that are left.
  c.mesh = dict(data=-1, fsdp=1)
  c.supervision = dict(
    silence=1800.0
  )  # seconds without a finished unit of work after which a process counts as hung

  # length: of the box, KS units. operator: strided | block_mean. frames: consecutive snapshots,
  # data.spacing apart, that the prior knows together.
  c.grid = dict(points=192, length=64.0, factor=8, operator="strided", frames=1)
  # Two unpaired worlds. dt: KS time units; scheme, cells: see downscaling/equations/ks.py.
  c.fine = dict(dt=0.125)
  c.coarse = dict(scheme="godunov", cells=96, dt=0.1, integrator="euler")
  c.data = dict(
    name="ks",
    dir="",  # "" for WORKDIR/data
    # KS time units before the first snapshot. 25 is the paper's, when KS is still a transient: the
    # variance is 1.23 at 25, 1.55 at 37.5, 1.72 from about 75 on.
    burn_in=100.0 if variant == "stationary" else 25.0,
    spacing=12.5,  # between snapshots
    snapshots=pick(2, 4, 4),  # a trajectory
    shard=pick(512, 1024, 64),  # trajectories a file
    # Trajectories of each split, one use each (downscaling/datasets/simulated.py).
    hfhr=pick(
      dict(train=6144, calibration=512, test=512, reference=4096, floor=2048),
      dict(train=12288, calibration=2048, test=2048, reference=4096, floor=4096),
      dict(train=128, calibration=64, test=64, reference=32, floor=32),
    ),
    lflr=pick(
      dict(train=4096, calibration=512, test=4096),
      dict(train=8192, calibration=1024, test=4096),
      dict(train=128, calibration=32, test=64),
    ),
  )

  c.debias = dict(
    # Which maps are fitted and shown (downscaling/debias/maps.py), and behind which one of them
    # samples are drawn.
    maps=("gaussian", "equivariant", "entropic"),
    map="equivariant",
    points=pick(8192, 32768, 256),  # snapshots a side in the fit
    epsilon=pick(0.0005, 0.0005, 0.01),  # entropic regularisation relative to the mean cost
    threshold=pick(2e-3, 1e-3, 1e-3),  # L1 error of the marginals
    max_iterations=pick(1000, 2000, 100),
    check_every=10,  # iterations between two looks at the marginals
    path="auto",  # dense | fused | ring | pallas: see downscaling/debias/entropic/sinkhorn_steps.py
    save_seconds=30.0,  # between two checkpoints
    # Of equivariant, letter by letter: see downscaling/debias/equivariant/equivariant_map.py. Each
    # N takes some seconds. What the N disturb of the moments, the last M mends.
    recipe=pick("GMQMNNNNM", "GMQMNNNNNNNNNNNNM", "GMQM"),
    # of the recipe, take only steps that improve rows outside the fit
    # (downscaling/debias/equivariant/step_selection.py)
    select=True,
    # Symmetries that maps keep: auto, the largest group that the bias respects by a test, or full,
    # trivial, or another name in downscaling/debias/bias_symmetry.py.
    group="auto",
    outlier=100.0,  # robust standard deviations of a value beyond which rows are refused
    minibatch=dict(
      batch=pick(256, 256, 32), passes=3.0
    ),  # of minibatch: rows a step, passes over the source
    held_out=pick(4096, 4096, 64),  # LFLR test snapshots that are debiased, in this order
  )

  # The prior is trained on fields of unit variance: every sigma is in that unit.
  c.schedule = dict(name="vp_linear", beta_min=0.1, beta_max=20.0, sigma_min=1e-3)
  c.noise = dict(
    kind="log_normal", mean=-1.2, std=1.6
  )  # levels to train on; the paper has uniform_time
  c.model = dict(
    channels=pick((32, 64, 128), (32, 64, 128), (8, 16)),
    strides=pick((2, 2, 2), (2, 2, 2), (2, 4)),
    blocks=1,
    stem=1,
    heads=0,  # the paper has 8; at 24 coarse points convolutions see the whole box
    embedding=pick(128, 128, 32),
    convolution="auto",
    dtype="float32",
    preconditioning="wiener",  # or edm, adaptive
  )
  c.optimizer = dict(peak=3e-3, end=1e-6, warmup_steps=pick(100, 500, 2), clip=1.0)
  # ema_decay: one, or several, e.g. (0.999, 0.9999): the first average is the prior.
  c.train = dict(
    batch=pick(128, 128, 16), total_steps=pick(800, 8000, 20), ema_decay=pick(0.995, 0.999, 0.9)
  )
  c.train.dir = (
    ""  # of the prior, which serves every grid.factor and grid.operator; "" for WORKDIR/train
  )
  c.train.augment = (
    False  # every field moved by a random symmetry of the equation, anew in each step: for few data
  )
  # What follows, up to profile, is free to change between restarts. How often, in steps;
  # save_minutes: by the clock.
  c.plan = dict(
    log_every=pick(50, 100, 5),
    eval_every=pick(500, 2000, 10),
    save_every=pick(500, 1000, 10),
    save_minutes=10.0,
  )
  # Checkpoints that stay: the last ones, every so many steps (0: none), the best by a metric of the
  # evaluation.
  c.keep = dict(last=3, every=0, best=0, metric="validation/error")
  # Time for memory: parts that a device's rows are done in, and the finest levels whose activations
  # are computed twice.
  c.memory = dict(microbatches=1, remat=0)
  c.watch = dict(
    fields=pick(64, 256, 8), steps=pick(16, 32, 4)
  )  # drawn at every evaluation, for their spectrum
  c.profile = dict(
    start_step=0, steps=0
  )  # a profiler trace of so many steps after start_step, for TensorBoard

  # guidance: paper (Eq. 7) | scaled | wiener | measured | moment | none; variance, of its gain:
  # gaussian | measured. solver: euler_maruyama | heun | dpm_solver_pp_2m[_sde]. start: "gaussian",
  # a draw of the Gaussian posterior plus noise of sigma_max; or "noise" alone (sigma_max >= 40).
  # The paper's own: start="noise", name="paper", final="overwrite", euler_maruyama, 256 exponential
  # levels from 150, resample.strength=0.
  c.sampling = dict(
    conditions=pick(256, 1024, 16),  # held-out coarse fields, or series of them
    # What is drawn, named after the map before it; default is debias.map. A large ensemble may ask
    # for the first alone, and for others later.
    sets=("default+diffusion", "raw+diffusion", "true+diffusion", "unconditional"),
    # A condition is `frames` consecutive snapshots, drawn by windows of grid.frames with `overlap`
    # in common.
    series=dict(frames=1, overlap=0),
    members=pick(8, 8, 2),  # of each
    unit=(pick(64, 64, 8), pick(8, 8, 2)),  # conditions × members drawn and written together
    start="gaussian",
    guidance=dict(name="measured", alpha=3.0, normalise="none", final="gain", variance="measured"),
    # C′x = y′ + noise: its standard deviation in data units; or auto, fitted to each map on
    # calibration rows, and 0 where conditions are no map's.
    observation_noise="auto",
    # share of members that may run away; they are marked, and more than that is refused
    max_failed=0.05,
    # Selection among a condition's members in a unit, at noise levels below `below`; strength 0:
    # none.
    resample=dict(strength=pick(0.125, 0.125, 0.0), dead_zone=3.0, below=100.0),
    # factor on members' distance from their mean, fitted on held-out conditions; 1: as drawn
    spread=1.0,
    # eta: of the SDE; churn: of heun; noise: a factor on what either draws, above 1 for a prior
    # that loses small scales
    solver=dict(name="dpm_solver_pp_2m_sde", eta=10.0, churn=0.0, noise=1.0),
    # guided (by what y′ leaves open at a level) | edm, with rho | exponential
    levels=dict(name="guided", steps=pick(24, 24, 4), sigma_max=3.0, sigma_min=3e-3, rho=7.0),
    unconditional=dict(fields=pick(256, 2048, 16), steps=pick(32, 48, 8), sigma_max=80.0),
  )
  # reference: true fields to compare with. draws: replicates behind intervals and floors.
  c.evaluate = dict(reference=pick(8192, 16_384, 128), draws=pick(200, 200, 40))

  if variant == "series":
    _in_time(c)
  return c


def _in_time(c):
  """What series ask for: neighbouring snapshots, a prior of windows, conditions that leave much
  open.
  """
  c.experiment = "ks-16x-series"
  c.grid.update(
    factor=16, frames=8
  )  # at every 8th point one snapshot determines the field, and time adds little
  c.data.update(spacing=1.0, snapshots=16)  # the field decorrelates within about 8 time units
  c.data.hfhr.update(train=4096, calibration=512, test=512, reference=512, floor=512)
  c.data.lflr.update(train=4096, calibration=256, test=512)
  c.debias.update(maps=("gaussian", "equivariant"), held_out=4096)
  # Selection acts on χ², which grows with the number of coarse values: off. The start from a draw
  # of the Gaussian posterior knows each frame alone, so it lies at a σ where what frames know of
  # each other is still to come.
  c.sampling.update(conditions=64, members=8, unit=(16, 8))
  c.sampling.series.update(frames=16, overlap=4)  # of windows and overlaps: docs/method.md
  c.sampling.resample.strength = 0.0
  c.sampling.solver.eta = 5.0
  c.sampling.levels.update(name="edm", steps=32, sigma_max=10.0)
  c.sampling.unconditional.fields = 64
