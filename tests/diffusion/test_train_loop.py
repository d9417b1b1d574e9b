import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.datasets import training_batches
from downscaling.diffusion import denoiser, train_loop, train_state, train_step, unet
from downscaling.fields import statistics
from downscaling.runtime import checkpoints as ckpt
from downscaling.runtime import mesh as meshes
from downscaling.runtime import metric_writer, supervision

N = 16
SPECTRUM = (1.0 / (1.0 + np.minimum(np.arange(N), N - np.arange(N)) ** 2))[
  :, None
].astype(np.float32)
SPECTRUM *= N / SPECTRUM.sum()


def _gaussian(count, seed=0):
  """Stationary Gaussian fields of SPECTRUM, unit variance, [count, N, 1]."""
  white = np.random.default_rng(seed).normal(size=(count, N, 1))
  return np.fft.ifft(np.sqrt(SPECTRUM) * np.fft.fft(white, axis=1), axis=1).real.astype(
    np.float32
  )


def _waves(count, seed=0):
  """One sine of random phase: far from Gaussian, so there is much to learn."""
  phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, (count, 1))
  return (np.sqrt(2) * np.sin(2 * np.pi * np.arange(N) / N + phase))[..., None].astype(
    np.float32
  )


def _denoiser(spectrum=SPECTRUM, gated=False):
  net = unet.UNet(channels=(8,), strides=(2,), blocks=1, heads=0, embedding=16)
  return denoiser.Denoiser(net, spectrum, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_silent_net_under_wiener_is_the_exact_gaussian_denoiser(sigma, gated):
  """E[x0 | x] of a Gaussian field by dense algebra. float32 FFTs: 1e-5 of the field's size."""
  d = _denoiser(gated=gated)
  x = jnp.asarray(_gaussian(3)) * (1 + sigma)
  params = jax.jit(d.init)(jax.random.key(0), x, jnp.ones(3))
  got = jax.jit(d.apply)(params, x, jnp.full(3, sigma))
  dft = np.fft.fft(np.eye(N)) / np.sqrt(N)
  cov = (dft.conj().T @ np.diag(SPECTRUM[:, 0]) @ dft).real
  exact = np.einsum("ij,bjc->bic", cov @ np.linalg.inv(cov + sigma**2 * np.eye(N)), x)
  np.testing.assert_allclose(got, exact, atol=1e-5 * (1 + sigma))


@pytest.mark.parametrize("gated", [False, True])
def test_a_static_field_tells_where_in_the_box_it_is(gated):
  """A net of stride 2 shifts with its input by 2 points; beside a static field it does so only if
  that shifts too.
  """
  static = np.cos(2 * np.pi * np.arange(N) / N)[:, None]
  x, sigma = jnp.asarray(_gaussian(2)), jnp.full(2, 0.5)
  for fields in (None, static):
    d = _denoiser(gated=gated).clone(static=fields)
    # The last convolution is silent.
    params = jax.jit(d.init)(jax.random.key(0), x, sigma)
    params = jax.tree.map(
      lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    out = lambda d, x, params=params: np.asarray(jax.jit(d.apply)(params, x, sigma))
    moved, there = out(d, jnp.roll(x, 2, 1)), np.roll(out(d, x), 2, 1)
    if fields is None:
      # float32 rounding of values of O(1).
      np.testing.assert_allclose(moved, there, atol=1e-5)
    else:
      assert np.abs(moved - there).max() > 0.01
      moved = out(d.clone(static=np.roll(static, 2, 0)), jnp.roll(x, 2, 1))
      np.testing.assert_allclose(moved, there, atol=1e-5)


class Gate(nn.Module):
  """Returns a = 0 and b = 1, and keeps what it was shown."""

  @nn.compact
  def __call__(self, x, level):
    self.sow("intermediates", "seen", x)
    return jnp.broadcast_to(jnp.array([0.0, 1.0]), x.shape)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 5.0])
def test_an_open_gate_has_a_closed_form(sigma):
  """b = 1 adds √(Sσ²/(S+σ²))·z mode by mode, z_k = √S/(S+σ²)·x_k over its rms; of a Gaussian field
  that rms is 1: 4096 samples × 16 modes, half of them alike, 4 standard errors of a variance are 3
  %."""
  x = _gaussian(4096) + sigma * np.random.default_rng(1).normal(
    size=(4096, N, 1)
  ).astype(np.float32)
  d = denoiser.Denoiser(Gate(), SPECTRUM, True)
  got, state = d.apply({}, x, jnp.full(len(x), sigma), mutable=["intermediates"])
  (seen,) = state["intermediates"]["net"]["seen"]
  np.testing.assert_allclose(
    seen[..., :1], x / np.sqrt(1 + sigma**2), rtol=1e-5, atol=1e-6
  )
  assert float(jnp.var(seen[..., 1])) == pytest.approx(1, rel=0.03)
  var = SPECTRUM + sigma**2
  z = np.sqrt(SPECTRUM) / var / np.sqrt(np.mean(SPECTRUM / var))
  gain = SPECTRUM / var + sigma * np.sqrt(SPECTRUM / var) * z
  exact = np.fft.ifft(gain * np.fft.fft(x, axis=1), axis=1).real
  np.testing.assert_allclose(
    got, exact, atol=1e-5 * (1 + sigma) * 4
  )  # float32 FFTs of values up to 4 deviations


def test_edm_limits():
  """D -> x as σ -> 0, and -> 0, the mean, as σ -> ∞ (silent net)."""
  d = _denoiser(None)
  x = jnp.asarray(_gaussian(2))
  params = jax.jit(d.init)(jax.random.key(0), x, jnp.ones(2))
  np.testing.assert_allclose(
    jax.jit(d.apply)(params, x, jnp.full(2, 1e-4)), x, atol=1e-6
  )
  assert float(jnp.abs(jax.jit(d.apply)(params, x, jnp.full(2, 1e4))).max()) < 1e-6
  with pytest.raises(ValueError, match="one noise level a sample"):
    d.apply(params, x, jnp.ones(()))


def test_loss_of_the_exact_denoiser_has_a_closed_form():
  """(σ²+1)/σ² · mean_k S_k σ²/(S_k+σ²); 4096 samples × 16 modes: 4 standard errors are 4·√(2/65536)
  ≈ 2 %.
  """
  d = _denoiser()
  x = jnp.asarray(_gaussian(4096))
  params = jax.jit(d.init)(jax.random.key(0), x[:1], jnp.ones(1))["params"]
  noise = jax.random.normal(jax.random.key(1), x.shape)
  error = jax.jit(lambda p, x, s: train_step.denoising_error(d, p, x, s, noise))
  for sigma in (0.1, 1.0):
    got = float(error(params, x, jnp.full(len(x), sigma)).mean())
    exact = (sigma**2 + 1) * np.mean(SPECTRUM / (SPECTRUM + sigma**2))
    assert got == pytest.approx(exact, rel=0.02)


class Memory(list):
  def __getitems__(self, index):
    return [self[i] for i in index]


class Never(supervision.Stop):
  """A stop that listens to nobody: true at the polls named."""

  def __init__(self, *polls):
    super().__init__()
    self.count, self.polls = 0, polls

  def __call__(self):
    self.count += 1
    return self.count in self.polls


def _optimiser(rate=1e-2, total=8):
  rate = train_state.learning_rate(
    peak=rate, end=1e-6, warmup_steps=2, total_steps=total
  )
  return rate, train_state.optimizer(rate, 1.0)


def _initial(net, rate=1e-2, total=8, averages=1):
  return lambda key, run: train_state.initial(
    net, _optimiser(rate, total)[1], (N,), 1, averages, key, run
  )


def _update(net, mesh, specs, rate=1e-2, total=8, decays=(0.9,), **kwargs):
  rate, tx = _optimiser(rate, total)
  sigmas = lambda key, batch: jnp.exp(jax.random.normal(key, (batch,)))
  return train_step.make_train_step(
    net, tx, sigmas, decays, mesh, specs, rate=rate, **kwargs
  )


def _run(
  folder, total=8, stop=None, mesh=None, rate=1e-2, source=None, save_every=2, fields=_gaussian,
  net=None, keep=3,
  microbatches=1, **evaluators,
):  # fmt: skip
  mesh, net = mesh or meshes.make(), net or _denoiser(None)
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), SPECTRUM
  )
  source = source or Memory({"u": u} for u in fields(64))
  held = jax.device_put(fields(8, seed=1), meshes.rows(mesh))
  return train_loop.train(
    folder,
    "hash",
    initialise=_initial(net, rate, total),
    make_update=lambda specs: _update(
      net, mesh, specs, rate, total, log_every=2, microbatches=microbatches
    ),
    make_validation=lambda specs, key: train_step.make_validation(
      net, mesh, specs, held, train_loop.SIGMAS, key
    ),
    batches=training_batches.Batches(source, stats, 8, seed=0),
    shape=(N, 1),
    evaluators=evaluators,
    mesh=mesh,
    seed=0,
    plan=train_loop.Plan(
      total_steps=total, log_every=2, eval_every=4, save_every=save_every
    ),
    keep=ckpt.Keep(keep) if isinstance(keep, int) else keep,
    config_text="{}",
    stop=stop or Never(),
  )


def _last(folder, mesh=None, net=None):
  _, target, _ = train_state.make(
    mesh or meshes.make(), _initial(net or _denoiser(None)), *[jax.random.key(0)] * 2
  )
  return ckpt.Checkpoints(folder / "checkpoints", "hash").restore_last(target)


def _numbers(tree):
  """On the host, keys as their words."""
  words = lambda x: (
    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  )
  return jax.device_get(jax.tree.map(words, tree))


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, _numbers(a), _numbers(b))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """The folder of eight steps that nothing disturbed."""
  folder = tmp_path_factory.mktemp("training") / "straight"
  _run(folder)
  return folder


# Polls: one after every step, one after each evaluator (of which there is one, at steps 4 and 8).
@pytest.mark.parametrize(("poll", "step"), [(3, 3), (4, 4), (5, 4), (8, 7)])
def test_eight_steps_are_some_and_a_stop_and_the_rest(straight, tmp_path, poll, step):
  """Parameters, average, optimiser, key and the log, byte for byte; the fifth poll stops within the
  evaluation.
  """
  with pytest.raises(
    supervision.Interrupted, match=f"stopped at step {step} of 8, which is saved"
  ):
    _run(tmp_path / "cut", stop=Never(poll))
  assert _last(tmp_path / "cut")[0] == step
  _run(tmp_path / "cut")
  (one, undisturbed), (two, cut) = _last(straight), _last(tmp_path / "cut")
  assert one == two == 8
  _equal(undisturbed, cut)
  assert (straight / "metrics.csv").read_bytes() == (
    tmp_path / "cut" / "metrics.csv"
  ).read_bytes()


def test_one_device_and_four_train_alike(tmp_path):
  """The same batches and noise; only the order of sums differs: 1e-4 of parameters of size 0.1
  after 8 steps of Adam, whose first steps move by the sign of the gradient. Noise drawn per device
  would differ at order 0.01."""
  ends = []
  for devices in (1, 4):
    mesh = meshes.make(devices)
    _run(tmp_path / str(devices), mesh=mesh)
    ends.append(jax.device_get(_last(tmp_path / str(devices), mesh)[1].ema))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *ends)
  losses = [metric_writer.read_scalars(tmp_path / d, "loss")[1] for d in "14"]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_learning_lowers_the_validation_error(tmp_path):
  result = _run(tmp_path, total=60, save_every=60, fields=_waves)
  _, errors = metric_writer.read_scalars(tmp_path, "validation/error")
  assert result["error"] == errors[-1] < 0.8 * errors[0]


def test_nan_stops_the_run_names_the_window_and_keeps_the_last_good(tmp_path):
  """The data hold one absurd value, met in a known step of the first epoch."""
  fields = _gaussian(64)
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), SPECTRUM
  )
  order = training_batches.Batches(Memory({"u": u} for u in fields), stats, 8, seed=0)
  fields[order.indices(4)[0], 3] = (
    1e30  # batch 4 is step 5; finite, so the door lets it in, but its square overflows
  )
  with pytest.raises(
    FloatingPointError,
    match=r"not finite at step 5, in the window \(4, 6\]. .* is step 4 and stays",
  ):
    _run(tmp_path, source=Memory({"u": u} for u in fields))
  step, state = _last(tmp_path)
  assert step == 4
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(_numbers(state)))


def test_prior_round_trip_and_messages(tmp_path):
  mesh = meshes.make()
  with pytest.raises(FileNotFoundError, match="downscaling train"):
    train_loop.load_prior(tmp_path, "hash", _denoiser(None), (N,), 1, mesh)
  _run(tmp_path)
  prior = train_loop.load_prior(tmp_path, "hash", _denoiser(None), (N,), 1, mesh)
  _equal(prior, _last(tmp_path)[1].ema[0])
  with pytest.raises(ValueError, match="warmup_steps=9 must lie in"):
    train_state.learning_rate(peak=1.0, end=0.0, warmup_steps=9, total_steps=8)


def test_averages_follow_their_definition():
  mesh, net, keys = (
    meshes.make(1),
    _denoiser(None),
    [jax.random.key(0), jax.random.key(1)],
  )
  start, _, specs = train_state.make(mesh, _initial(net, averages=2), *keys)
  step = jax.jit(_update(net, mesh, specs.params, decays=(0.5, 0.2)))
  state = start(*keys)
  x = {"x": jnp.asarray(_gaussian(4))}
  expected = list(state.ema)
  for i in range(8):
    state, _ = step(state, x)
    for j, most in enumerate((0.5, 0.2)):
      decay = min(most, (1 + i) / (10 + i))
      expected[j] = jax.tree.map(
        lambda e, p, d=decay: d * e + (1 - d) * p, expected[j], state.params
      )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, tuple(expected)
  )
