"""What foretells the order after a long distillation: scores, the repaired cut, or a few steps of training?

    prune-lab run --config long.toml --run RUN      # every plan of one budget, all of them distilled to the end
    python -m benchmarks.ranking RUN --forecasts forecasts.csv --out reports/ranking

Reads the run's tables alone (candidates/<id>/heldout.csv: step, row, loss) and forecasts.csv: plan_id, name, origin,
one_shot (impact), added_up (scores), repaired (held-out loss of the repaired plan before training). Writes
outcomes.csv, agreement.csv (a row per forecast), over_steps.csv (the same for the loss at every step), tournaments.csv
(``run_tournament`` on the recorded losses), the verdicts of each, pairing.csv (what common rows are worth), figures,
README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.ranking_pages import Trajectories, draw_curves, draw_flow, draw_tau, page
from prune_lab.config import load_config
from prune_lab.errors import DataError
from prune_lab.ranking import paired_difference, run_tournament, rungs, tie_groups
from prune_lab.report import PlanRow, plan_styles
from prune_lab.runs import Run, open_run, read_typed
from prune_lab.runtime import write_frame, write_text

Floats = NDArray[np.float64]
FORECAST_COLUMNS = ("plan_id", "name", "origin", "one_shot", "added_up", "repaired")
LOOKS = (50, 150, 500)  # steps after which the loss is tried as a forecast
TOURNAMENTS = ("2:50", "3:50", "4:50", "2:150", "3:150")
DRAWS = 2000


# Reading ---------------------------------------------------------------------------------------------------------


def read_trajectories(run: Run, forecasts: pd.DataFrame) -> tuple[Trajectories, list[str]]:
    """(the losses of all plans that came to the end, a line about each of the others)."""
    tables: dict[str, pd.DataFrame] = {}
    notes = []
    labels = dict(zip(forecasts["plan_id"], forecasts["name"], strict=True))
    for plan_id in forecasts["plan_id"]:
        path = run.candidate(plan_id).folder / "heldout.csv"
        if path.is_file():
            tables[plan_id] = pd.read_csv(path).pivot_table(index="step", columns="row", values="loss")
        else:
            notes.append(f"{labels[plan_id]} has no heldout.csv and is left out")
    end = max((int(table.index.max()) for table in tables.values()), default=0)
    short = [
        plan_id for plan_id, table in tables.items() if table.index.max() < end or table.isna().any(axis=None)
    ]
    for plan_id in short:
        notes.append(
            f"{labels[plan_id]} stopped at step {tables.pop(plan_id).index.max()} of {end} and is left out"
        )
    if len(tables) < 3:
        raise DataError(
            f"asked to compare the plans of {run.folder}, found {len(tables)} that came to the end; three do"
        )
    steps = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    rows = {tuple(table.columns) for table in tables.values()}
    if len(rows) > 1:
        raise DataError(
            f"asked to pair the losses of {run.folder}, found plans with other rows; judge all on the same"
        )
    losses = np.stack([table.loc[steps].to_numpy() for table in tables.values()])
    own = forecasts.set_index("plan_id").loc[list(tables)]
    plans = [
        PlanRow(str(plan_id), str(row["name"]), str(row["origin"]), ()) for plan_id, row in own.iterrows()
    ]
    return Trajectories(tuple(plans), np.array(steps), losses), notes


def forecast_table(run: Run, forecasts: pd.DataFrame, told: Trajectories) -> dict[str, Floats]:
    """What is known of every plan before the end, lower is better: name of the forecast to a number per plan."""
    own = forecasts.set_index("plan_id").loc[[plan.id for plan in told.plans]]
    impact = own["one_shot"]
    if run.done(run.ranking):
        ranking = pd.read_csv(run.ranking, dtype={"plan_id": str}).set_index("plan_id")
        impact = ranking["impact_one_shot"].reindex(own.index).fillna(impact)
    found = {"added-up scores": own["added_up"], "one-shot impact": impact}
    values = {name: column.to_numpy(dtype=np.float64) for name, column in found.items()}
    values["loss at step 0"] = told.mean(0)
    values["repaired loss"] = own["repaired"].to_numpy(dtype=np.float64)
    looks = [step for step in LOOKS if step in told.steps and step < told.steps[-1]]
    values |= {f"loss at step {step}": told.mean(step) for step in looks}
    return {name: column for name, column in values.items() if np.isfinite(column).all()}


# Agreement -------------------------------------------------------------------------------------------------------


def tau_b(one: Floats, other: Floats) -> Floats:
    """(...) Kendall's tau-b over the last axis of ``one`` and ``other`` (..., N); NaN where one is constant."""
    left, right = np.triu_indices(one.shape[-1], 1)
    a, b = (np.sign(values[..., left] - values[..., right]) for values in (one, other))
    with np.errstate(invalid="ignore"):  # constant: 0 / 0
        found: Floats = (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return found


def _ends(draws: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return float(low), float(high)


def resampled_means(told: Trajectories, draws: int, seed: int) -> Floats:
    """(draws, N, S) mean losses on resampled rows, the same rows for every plan and step."""
    rows = told.losses.shape[2]
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=draws)
    found: Floats = np.einsum("nsr,dr->dns", told.losses, counts / rows, optimize=True)
    return found


def agreement_row(
    name: str, values: Floats, drawn: Floats, again: Floats, told: Trajectories
) -> dict[str, object]:
    """How well ``values`` (N,) order the plans by the outcome; ``drawn`` (D, N) or (N,) are they on resampled rows.

    ``again`` (D, N) is the outcome on these rows.
    """
    outcome, end = told.mean(told.steps[-1]), told.losses[:, -1]
    plans = np.random.default_rng(1).integers(len(outcome), size=(len(again), len(outcome)))
    left, right = np.triu_indices(len(outcome), 1)
    gaps = [paired_difference(end[i], end[j]) for i, j in zip(left, right, strict=True)]
    decided = np.array([not gap.tie for gap in gaps])
    agree = np.sign(values[left] - values[right]) * np.sign(outcome[left] - outcome[right])
    first, best = int(values.argmin()), int(outcome.argmin())
    regret = paired_difference(end[first], end[best])
    rows = _ends(tau_b(np.broadcast_to(drawn, again.shape), again))
    resampled = _ends(tau_b(values[plans], outcome[plans]))
    return {
        "forecast": name,
        "tau": float(tau_b(values, outcome)),
        **dict(zip(("rows_low", "rows_high"), rows, strict=True)),
        **dict(zip(("plans_low", "plans_high"), resampled, strict=True)),
        "right_order": float((agree[decided] + 1).mean() / 2) if decided.any() else float("nan"),
        "decided_pairs": int(decided.sum()),
        "pairs": len(left),
        "first": told.plans[first].label,
        "regret": regret.mean,
        "regret_low": regret.low,
        "regret_high": regret.high,
        "regret_tie": regret.tie,
    }


def agreements(values: Mapping[str, Floats], told: Trajectories) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per forecast, a row per step before the last)."""
    means = resampled_means(told, DRAWS, 0)
    again = means[:, :, -1]
    rows = []
    for name, own in values.items():
        step = int(name.rsplit(" ", 1)[1]) if name.startswith("loss at step") else None
        drawn = own if step is None else means[:, :, list(told.steps).index(step)]
        rows.append(agreement_row(name, own, drawn, again, told))
    steps = [
        {"step": int(step)}
        | agreement_row(f"loss at step {step}", told.mean(step), means[:, :, i], again, told)
        for i, step in enumerate(told.steps[:-1])
    ]
    return pd.DataFrame(rows), pd.DataFrame(steps)


def reliability(told: Trajectories, draws: int = 200) -> float:
    """Mean tau-b between the outcomes on random halves of the rows: what the rows let any forecast reach, or less."""
    generator, rows = np.random.default_rng(2), told.losses.shape[2]
    found = []
    for _ in range(draws):
        order = generator.permutation(rows)
        halves = (told.losses[:, -1, part].mean(axis=1) for part in (order[: rows // 2], order[rows // 2 :]))
        found.append(float(tau_b(*halves)))
    return float(np.mean(found))


def pairing(told: Trajectories, steps: Sequence[int]) -> pd.DataFrame:
    """Standard errors of the differences between all plans with common rows, and with rows of each one's own."""
    left, right = np.triu_indices(len(told.plans), 1)
    count = told.losses.shape[2]
    rows = []
    for step in steps:
        at = told.losses[:, list(told.steps).index(step)]
        paired = (at[left] - at[right]).std(axis=1, ddof=1) / count**0.5
        alone = np.sqrt((at[left].var(axis=1, ddof=1) + at[right].var(axis=1, ddof=1)) / count)
        rows.append(
            {
                "step": step,
                "pairs": len(left),
                "rows": count,
                "paired_se": float(np.median(paired)),
                "unpaired_se": float(np.median(alone)),
                "rows_factor": float(np.median((alone / paired) ** 2)),
            }
        )
    return pd.DataFrame(rows)


# Tournaments -----------------------------------------------------------------------------------------------------


def replays(
    told: Trajectories, settings: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], list[str]]:
    """(a row per tournament on the recorded losses, its verdicts by name, a line about each that cannot be played)."""
    place = {plan.id: i for i, plan in enumerate(told.plans)}
    labels = {plan.id: plan.label for plan in told.plans}
    steps, end = told.steps.tolist(), told.losses[:, -1]
    best = int(end.mean(axis=1).argmin())

    def measure(names: Sequence[str], step: int) -> dict[str, Floats | str]:
        return {name: told.losses[place[name], steps.index(step)] for name in names}

    rows, verdicts, notes = [], {}, []
    for setting in settings:
        eta, first = (int(part) for part in setting.split(":"))
        at = rungs(steps[-1], eta, first) if first <= steps[-1] else ()
        if not at or not set(at) <= set(steps):
            notes.append(
                f"eta {eta} from {first} steps cannot be played: its rungs {list(at)} were not recorded"
            )
            continue
        for most in (2, 1):
            found = run_tournament([plan.id for plan in told.plans], at, eta, measure, most=most)
            gap = paired_difference(end[place[found.survivors[0]]], end[best])
            rows.append(
                {
                    "eta": eta,
                    "rungs": " ".join(map(str, at)),
                    "ties_go_on": most > 1,
                    "cost": found.cost,
                    "full_cost": found.full_cost,
                    "share": found.cost / found.full_cost,
                    "survivors": len(found.survivors),
                    "best_survived": told.plans[best].id in found.survivors,
                    "winner": labels[found.survivors[0]],
                    "difference": gap.mean,
                    "low": gap.low,
                    "high": gap.high,
                    "tie": gap.tie,
                }
            )
            frame = found.frame()
            for column in ("name", "against"):
                frame[column] = frame[column].map(lambda plan_id: labels.get(plan_id, plan_id))
            verdicts[f"tournament_eta{eta}_from{first}{'' if most > 1 else '_no_ties'}"] = frame
    return pd.DataFrame(rows), verdicts, notes


def outcome_table(told: Trajectories, values: Mapping[str, Floats]) -> pd.DataFrame:
    """A row per plan in order of the outcome: every forecast, the loss at the end, its tie group."""
    groups = tie_groups({plan.id: rows for plan, rows in zip(told.plans, told.losses[:, -1], strict=True)})
    frame = pd.DataFrame(
        {"plan_id": [plan.id for plan in told.plans], "plan": [plan.label for plan in told.plans]}
    )
    frame["origin"] = [plan.origin for plan in told.plans]
    for name, column in values.items():
        frame[name] = column
    frame["outcome"] = told.mean(told.steps[-1])
    frame["tie_group"] = frame["plan_id"].map(groups)
    frame = frame.sort_values("outcome", ignore_index=True)
    frame.insert(0, "rank", range(1, len(frame) + 1))
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--forecasts", type=Path, required=True)
    parser.add_argument("--tournament", nargs="*", default=TOURNAMENTS, metavar="ETA:FIRST")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run = open_run(arguments.run, must_exist=True)
    config = load_config(run.config)
    forecasts = pd.read_csv(arguments.forecasts, dtype={"plan_id": str})
    if missing := [name for name in FORECAST_COLUMNS if name not in forecasts]:
        raise DataError(
            f"asked to read {arguments.forecasts}, found no column {missing[0]!r}; write it again"
        )
    told, notes = read_trajectories(run, forecasts)
    values = forecast_table(run, forecasts, told)
    agreement, over_steps = agreements(values, told)
    played, verdicts, unplayed = replays(told, arguments.tournament)
    looks = [step for step in (0, *LOOKS) if step in told.steps]
    pairs = pairing(told, [*looks, int(told.steps[-1])])
    outcomes = outcome_table(told, values)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, frame in (
        ("outcomes", outcomes),
        ("agreement", agreement),
        ("over_steps", over_steps),
        ("tournaments", played),
        ("pairing", pairs),
        *verdicts.items(),
    ):
        write_frame(arguments.out / f"{name}.csv", frame)
    styles = plan_styles(told.plans)
    draw_curves(told, styles, arguments.out)
    draw_tau(over_steps, agreement, arguments.out)
    draw_flow(outcomes, list(values), styles, arguments.out)
    (arguments.out / "environment.json").write_bytes(run.environment.read_bytes())
    environment = read_typed(run.environment, dict[str, Any])
    text = page(told, outcomes, agreement, over_steps, played, pairs, reliability(told), config, environment)
    write_text(arguments.out / "README.md", text + "".join(f"\n{note}.\n" for note in [*notes, *unplayed]))


if __name__ == "__main__":
    main()
