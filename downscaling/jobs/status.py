"""`downscaling status WORKDIR`: how far every stage is, and where its wall time went."""

import pathlib

from downscaling.runtime import files, ledger, products

HEAD = (
  "stage",
  "state",
  "attempts",
  "wall",
  "productive",
  *ledger.KINDS,
  "lost",
  "nobody at work",
)


def status(folder: pathlib.Path) -> str:
  """The report. Raises: FileNotFoundError if there is no stage in the folder or below."""
  markers = [p for p in folder.rglob(products.MARKER) if p.parent.suffix != ".units"]
  if not markers:
    raise FileNotFoundError(
      f"{folder} holds no stage of a run (no {products.MARKER} in it or below): give the --workdir "
      "of a job."
    )
  found = [(p.parent, files.read_json(p), ledger.account(p.parent)) for p in markers]
  found.sort(key=lambda each: ledger.began(each[0]))
  rows = [HEAD, *(_row(path, record, account) for path, record, account in found)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
  lines = [
    "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  accounts = [account for *_, account in found if account]
  lines += ["", *_together(accounts), *_NOTES]
  return "\n".join(line.rstrip() for line in lines)


_NOTES = (
  "Shares are of the process-seconds of all attempts. lost: work after the last save of an attempt",
  "that ended by force, which the next one did again. wall: from the first start to the last sign",
  "of life; nobody at work: of it, between attempts.",
)


def _row(
  path: pathlib.Path, record: dict, account: ledger.Account | None
) -> tuple[str, ...]:
  state = "complete" if record.get("complete") else "unfinished"
  if account is None:
    return (path.name, state, *["" for _ in HEAD[2:]])
  if account.under_way:
    state = f"at work ({account.under_way})"
  share = lambda seconds: f"{seconds / account.busy:.0%}" if account.busy else ""
  return (
    path.name,
    state,
    f"{account.attempts} on {account.hosts} host(s)",
    _duration(account.wall),
    share(account.productive),
    *(share(account.spent[kind]) for kind in ledger.KINDS),
    share(account.lost),
    _duration(account.apart),
  )


def _together(accounts: list[ledger.Account]) -> list[str]:
  """One line over all stages."""
  busy = sum(a.busy for a in accounts)
  if not busy:
    return []
  productive = sum(a.productive for a in accounts)
  return [
    f"goodput {productive / busy:.0%} of {_duration(busy)} at work, in "
    f"{sum(a.attempts for a in accounts)} attempts"
  ]


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
