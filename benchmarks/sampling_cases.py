"""Named settings of the sampler for `benchmarks/sampling.py`, as overrides of config.sampling."""

# Eq. 7 as the paper samples it. Its strength, guidance.alpha, is not public: sampling_rival.py fits
# it.
EQ7 = {
  "start": "noise",
  "guidance.name": "paper",
  "guidance.normalise": "none",
  "guidance.final": "overwrite",
  "guidance.variance": "gaussian",
  "solver.name": "euler_maruyama",
  "levels.name": "exponential",
  "levels.steps": 256,
  "levels.sigma_max": 150.0,
  "levels.sigma_min": 1e-3,
  "resample.strength": 0.0,
  "spread": 1.0,
}
# The authors' library divides a strength of .5 by the share of values that are observed: 4 for KS
# at every 8th point.
LIBRARY = {"guidance.alpha": 0.5, "guidance.normalise": "divide"}
LOW = {
  "start": "gaussian",
  "solver.name": "dpm_solver_pp_2m_sde",
  "solver.eta": 1.0,
  "solver.noise": 1.0,
  "levels.name": "edm",
  "levels.sigma_max": 3.0,
  "levels.sigma_min": 3e-3,
  "levels.rho": 7.0,
  "levels.steps": 16,
  "guidance.normalise": "none",
  "guidance.final": "gain",
  "guidance.variance": "measured",
  "resample.strength": 0.0,
  "resample.dead_zone": 3.0,
  "resample.below": 100.0,
  "spread": 1.0,
}
NOISE = {"start": "noise", "levels.sigma_max": 80.0}
OVERWRITE = {"guidance.name": "paper", "guidance.final": "overwrite"}
DEFAULT = "default"  # what the config draws with


def case(guidance, steps=16, eta=1.0, strength=0.0, **more):
  """Overrides for a low start; more: others, with __ for the dot."""
  dotted = {key.replace("__", "."): value for key, value in more.items()}
  named = {"guidance.name": guidance, "levels.steps": steps}
  return LOW | named | {"solver.eta": eta, "resample.strength": strength} | dotted


def eq7_sde(steps, alpha=4.0):
  """Eq. 7 with our best solver."""
  return case("paper", steps) | OVERWRITE | NOISE | {"guidance.alpha": alpha}


CASES = {
  "eq7 α1 em 256": EQ7 | {"guidance.alpha": 1.0},
  "eq7 library em 256": EQ7 | LIBRARY,
  "eq7 library em 64": EQ7 | LIBRARY | {"levels.steps": 64},
  "eq7 α4 sde 32": eq7_sde(32),
  "eq7 α4 sde 16": eq7_sde(16),
  "scaled η2.5 16": case("scaled", 16, 2.5, guidance__alpha=3.0),
  "scaled η2.5 32": case("scaled", 32, 2.5, guidance__alpha=3.0),
  "wiener η1 16": case("wiener"),
  "wiener η5 16": case("wiener", 16, 5.0),
  "measured heun 16": case("measured", 16, solver__name="heun"),
  "measured ode 16": case("measured", 16, solver__name="dpm_solver_pp_2m"),
  "measured η1 16": case("measured"),
  "measured η1 32": case("measured", 32),
  "measured η5 16": case("measured", 16, 5.0),
  "measured η10 24": case("measured", 24, 10.0),
  "measured η10 32": case("measured", 32, 10.0),
  "measured noise η1 32": case("measured", 32) | NOISE,
  "measured+r1.6 η2.5 16": case("measured", 16, 2.5, 0.125, resample__dead_zone=1.6),
  "measured+r η5 8": case("measured", 8, 5.0, 0.125),
  "measured+r η5 16": case("measured", 16, 5.0, 0.125),
  "measured+r η5 24": case("measured", 24, 5.0, 0.125),
  "measured+r η10 16": case("measured", 16, 10.0, 0.125),
  "measured+r η10 24": case("measured", 24, 10.0, 0.125),
  "measured+r η10 32": case("measured", 32, 10.0, 0.125),
  "guided+r η10 16": case("measured", 16, 10.0, 0.125, levels__name="guided"),
  "guided+r η10 24": case("measured", 24, 10.0, 0.125, levels__name="guided"),
  "guided+r η10 32": case("measured", 32, 10.0, 0.125, levels__name="guided"),
  "measured+r η5 32": case("measured", 32, 5.0, 0.125),
  "moment η1 16": case("moment"),
  "moment η5 16": case("moment", 16, 5.0),
  "moment+r η5 8": case("moment", 8, 5.0, 0.125),
  "moment+r η5 12": case("moment", 12, 5.0, 0.125),
  "moment+r η5 16": case("moment", 16, 5.0, 0.125),
  "moment+r η10 12": case("moment", 12, 10.0, 0.125),
  DEFAULT: {},
}
FRONT = (
  "scaled η2.5 32",
  "wiener η5 16",
  "measured η1 16",
  "measured η5 16",
  "measured η10 32",
  "measured+r1.6 η2.5 16",
  "measured+r η5 8",
  "measured+r η5 24",
  "measured+r η5 32",
  "measured+r η10 16",
  "measured+r η10 24",
  "measured+r η10 32",
  "guided+r η10 16",
  "guided+r η10 32",
  "moment η5 16",
  "moment+r η5 12",
  "moment+r η10 12",
  DEFAULT,
)
