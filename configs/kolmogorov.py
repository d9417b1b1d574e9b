r"""Kolmogorov flow, vorticity on the plane: biased coarse fields -> fine turbulence (Wan et al.
2023, section 5).

Real:   --config=configs/kolmogorov.py:8x    256² -> 32², for accelerators; :16x for 256² -> 16²
Proxy:  --config=configs/kolmogorov.py:cpu   128² -> 32², a factor of 4, what two cores can do; --config.grid.factor=8
        in another --workdir: 128² -> 16²
Smoke:  --config=configs/kolmogorov.py:smoke every job in minutes; its scores mean nothing

Plan:   python -m downscaling train --config=configs/kolmogorov.py:8x --workdir=runs/kolmogorov --dry_run --devices=256

`cpu`, 96 conditions: 3 h on two busy cores; MELRw .031 (floor .032), symcov .106 (.108), spread
over error .98; the map at 32²: symcov .039 (.058), corr(y, T y) .936; see docs/results/kolmogorov.
`8x` and `16x` are planned and compiled, not trained.
"""

import ml_collections

VARIANTS = ("8x", "16x", "cpu", "smoke")


def get_config(variant="cpu"):
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/kolmogorov.py:{variant} is unknown; use one of "
      f"{', '.join(':' + v for v in VARIANTS)}."
    )

  def pick(real, cpu, smoke):
    return {"8x": real, "16x": real, "cpu": cpu, "smoke": smoke}[variant]

  c = ml_collections.ConfigDict()
  c.experiment = {"8x": "kolmogorov-8x", "16x": "kolmogorov-16x", "cpu": "kolmogorov-4x-proxy"}.get(
    variant, variant
  )
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

  # The box is (2π)². operator: strided | block_mean. frames: consecutive snapshots that the prior
  # knows together.
  factor = {"8x": 8, "16x": 16, "cpu": 4, "smoke": 2}[variant]
  c.grid = dict(points=pick(256, 128, 64), factor=factor, operator="strided", frames=1)
  # Two unpaired worlds. dt: in units of the equation; the rest: see
  # downscaling/equations/kolmogorov.py.
  c.fine = dict(dt=pick(0.005, 0.01, 0.02))
  c.coarse = dict(cells=32, dt=0.02, integrator="euler")
  c.data = dict(
    name="kolmogorov",
    dir="",  # "" for WORKDIR/data
    burn_in=pick(40.0, 40.0, 4.0),  # time units before the first snapshot
    spacing=pick(
      3.0, 2.0, 1.0
    ),  # between snapshots: after 2 the fine field keeps .12 of itself, after 3 .06
    snapshots=pick(128, 96, 4),  # a trajectory
    shard=pick(32, 16, 8),  # trajectories a file
    # Trajectories of each split, one use each (downscaling/datasets/simulated.py).
    hfhr=pick(
      dict(train=512, calibration=48, test=64, reference=32, floor=32),
      dict(train=64, calibration=16, test=24, reference=24, floor=24),
      dict(train=16, calibration=16, test=8, reference=8, floor=8),
    ),
    lflr=pick(
      dict(train=512, calibration=48, test=64),
      dict(train=192, calibration=16, test=64),
      dict(train=16, calibration=8, test=8),
    ),
  )

  c.debias = dict(
    # Which maps are fitted and shown (downscaling/debias/maps.py), and behind which one of them
    # samples are drawn.
    maps=("entropic", "gaussian", "equivariant"),
    map="equivariant",
    points=pick(65536, 6144, 64),  # snapshots a side in the fit
    epsilon=pick(0.0003, 0.0003, 0.01),  # entropic regularisation relative to the mean cost
    threshold=1e-3,  # L1 error of the marginals
    max_iterations=pick(2000, 2000, 100),
    check_every=10,  # iterations between two looks at the marginals
    path="auto",  # dense | fused | ring | pallas: see downscaling/debias/entropic/sinkhorn_steps.py
    save_seconds=30.0,  # between two checkpoints
    # Of equivariant, letter by letter: see downscaling/debias/equivariant/equivariant_map.py. An M
    # is limited to small moves: several are needed, and each disturbs the covariance a little,
    # which the G after it mends.
    recipe=pick("GMQGMMGMG", "GMQGMMGMG", "GQG"),
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
    held_out=pick(4096, 2048, 16),  # LFLR test snapshots that are debiased
  )

  # The prior is trained on fields of unit variance: every sigma is in that unit.
  c.schedule = dict(name="vp_linear", beta_min=0.1, beta_max=20.0, sigma_min=1e-3)
  c.noise = dict(
    kind="log_normal", mean=-1.2, std=1.6
  )  # levels to train on; the paper has uniform_time
  # Blocks run from 64² down to 8² at 256², from 32² (a stem of 4) down to 8² at 128².
  c.model = dict(
    channels=pick((64, 128, 256, 512), (64, 96, 128), (8, 16)),
    strides=pick((2, 2, 2, 2), (1, 2, 2), (2, 2)),
    blocks=pick(2, 1, 1),
    stem=pick(2, 4, 2),
    heads=pick(8, 0, 0),  # attention at the coarsest level
    embedding=pick(256, 128, 32),
    convolution="auto",
    dtype=pick("bfloat16", "float32", "float32"),
    preconditioning="adaptive",  # or wiener, edm
    static=(
      "forcing",
    ),  # fields that the net sees beside x: without the forcing it cannot tell y from y + π/4
  )
  c.optimizer = dict(
    peak=pick(5e-4, 1e-3, 1e-3), end=1e-6, warmup_steps=pick(2000, 300, 2), clip=1.0
  )
  # ema_decay: one, or several, e.g. (0.999, 0.9999): the first average is the prior.
  c.train = dict(
    batch=pick(256, 16, 8), total_steps=pick(200_000, 6000, 4), ema_decay=pick(0.9999, 0.999, 0.9)
  )
  c.train.dir = (
    ""  # of the prior, which serves every grid.factor and grid.operator; "" for WORKDIR/train
  )
  # Every field moved by a random symmetry of the equation, anew in each step: for few data, as 64
  # trajectories.
  c.train.augment = pick(False, True, False)
  # What follows, up to profile, is free to change between restarts. How often, in steps;
  # save_minutes: by the clock.
  c.plan = dict(
    log_every=pick(100, 50, 2),
    eval_every=pick(5000, 1000, 4),
    save_every=pick(1000, 500, 2),
    save_minutes=10.0,
  )
  # Checkpoints that stay: the last ones, every so many steps (0: none), the best by a metric of the
  # evaluation.
  c.keep = dict(last=3, every=0, best=0, metric="validation/error")
  # Time for memory: parts that a device's rows are done in, and the finest levels whose activations
  # are computed twice.
  c.memory = dict(microbatches=1, remat=0)
  c.watch = dict(
    fields=pick(256, 32, 8), steps=pick(32, 16, 4)
  )  # drawn at every evaluation, for their spectrum
  c.profile = dict(
    start_step=0, steps=0
  )  # a profiler trace of so many steps after start_step, for TensorBoard

  # guidance: paper (Eq. 7) | scaled | wiener | measured | moment | none; variance, of its gain:
  # gaussian | measured. solver: euler_maruyama | heun | dpm_solver_pp_2m[_sde]. start: "gaussian",
  # a draw of the Gaussian posterior plus noise of sigma_max; or "noise" alone (sigma_max >= 40).
  c.sampling = dict(
    conditions=pick(
      1024, 192, 8
    ),  # of the held-out coarse fields, spread over trajectories, or series of them
    # What is drawn, named after the map before it; default is debias.map. A large ensemble may ask
    # for the first alone, and for others later.
    sets=("default+diffusion", "raw+diffusion", "true+diffusion", "unconditional"),
    # A condition is `frames` consecutive snapshots, drawn by windows of grid.frames with `overlap`
    # in common.
    series=dict(frames=1, overlap=0),
    members=pick(16, 4, 2),  # of each
    unit=pick((16, 16), (16, 4), (4, 2)),  # conditions × members drawn and written together
    start="gaussian",
    guidance=dict(name="measured", alpha=3.0, normalise="none", final="gain", variance="measured"),
    # C′x = y′ + noise: its standard deviation in data units; or auto, fitted to each map on
    # calibration rows, and 0 where conditions are no map's.
    observation_noise="auto",
    # share of members that may run away; they are marked, and more than that is refused
    max_failed=0.05,
    # Selection among a condition's members in a unit, at noise levels below `below`; strength 0:
    # none, as with .125 ensembles of `cpu` become too narrow (docs/results/kolmogorov). Both
    # numbers are KS's, for 24 coarse values, and carried over to more by sampling/resampling.py
    # (32² is 1024).
    resample=dict(strength=0.0, dead_zone=3.0, below=100.0),
    # factor on members' distance from their mean, fitted on held-out conditions; 1: as drawn
    spread=1.0,
    # eta: of the SDE; churn: of heun; noise: a factor on what either draws, as a network takes
    # small scales away with the noise; fitted for the prior of `cpu` on its validation fields
    # (docs/results/kolmogorov; 1.1 for a grid.factor of 8), 1 for an exact one.
    solver=dict(name="dpm_solver_pp_2m_sde", eta=10.0, churn=0.0, noise=pick(1.0, 1.06, 1.0)),
    levels=dict(name="edm", steps=pick(24, 24, 4), sigma_max=3.0, sigma_min=3e-3, rho=7.0),
    unconditional=dict(fields=pick(2048, 256, 8), steps=pick(48, 32, 4), sigma_max=80.0),
  )
  # reference: true fields to compare with. draws: replicates behind intervals and floors.
  c.evaluate = dict(reference=pick(4096, 2304, 32), draws=pick(100, 100, 40))

  return c
