"""All that wants a GPU, in ten minutes: scoring, latency, distillation, memory that ends, two processes on one card.

    python -m benchmarks.gpu --out DIR
    python -m benchmarks.gpu --device cpu --tiny --out DIR

Installs nothing and reads nothing: models have the shapes of SD-v1.4 (or, with ``--tiny``, of a small U-Net with the
same blocks) and random weights. Every section stands alone: what fails is noted with its reason and the others go on,
and a section that the time left is too short for is left out with a word. Writes gpu.json and gpu.md: the card, number
formats, shapes, seeds, repeats and versions, and a table per section.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import PNDMScheduler

from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.counting import count_macs
from prune_lab.distill import DistillSetup, LatentData, Student, draw_batch, feature_pairs, joint
from prune_lab.distill.losses import student_losses
from prune_lab.distill.memory import pass_bytes
from prune_lab.distill.setup import StudentRun
from prune_lab.errors import DeviceError
from prune_lab.families import embedding_width, latent_shape
from prune_lab.models import resolve_model
from prune_lab.plans import gone_with, native_layout, parse_plan
from prune_lab.prefix_sharing import ComputeCost, predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.processes import init_processes
from prune_lab.profiling import (
    Service,
    measure_latency_table,
    random_model,
    random_native_plans,
    time_plans,
)
from prune_lab.profiling.own_process import TimingProcess
from prune_lab.runtime import (
    Environment,
    free_bytes,
    pick_device,
    pick_dtype,
    synchronize,
    write_json,
    write_text,
)
from prune_lab.surgery import bypassed, materialise

Row = dict[str, Any]
_COMPILING = 150  # seconds that compiling all blocks may take
PLANS = ("bk-base", "bk-small", "bk-tiny")
TINY = {
    "sample_size": 16,
    "block_out_channels": [8, 16, 32, 32],
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sections share: the card, the model, the seed, and when it has to be over."""

    device: torch.device
    dtype: torch.dtype
    config: Mapping[str, Any]
    tokens: int
    tiny: bool
    seed: int
    repeats: int
    until: float  # of time.monotonic
    found: dict[str, list[Row]] = field(default_factory=dict)  # rows of the sections before

    @property
    def left(self) -> float:
        """Seconds until it has to be over."""
        return self.until - time.monotonic()

    def model(self) -> Any:
        """The model with random weights."""
        return random_model(self.config, device=self.device, dtype=self.dtype, seed=self.seed)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Of one call, the device idle before and after."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start)

    @property
    def matrix_rate(self) -> float | None:
        """Multiply-adds a second of a big product of matrices on this card; None where that was not measured."""
        rows = self.found.get("matrix", [])
        return next((row["gmacs_per_s"] * 1e9 for row in rows if row["dtype"] == str(self.dtype)[6:]), None)


# Sections ------------------------------------------------------------------------------------------------


def matrix(bench: Bench) -> list[Row]:
    """Multiply-adds a second of a square product, which is as fast as this card gets, in both number formats."""
    side = 256 if bench.tiny else 8192
    rows = []
    for dtype in dict.fromkeys((bench.dtype, torch.float32)):
        left, right = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        call = partial(torch.mm, left, right)
        times = [bench.milliseconds(call) for _ in range(3 + bench.repeats)][3:]
        middle = statistics.median(times)
        rate = side**3 / middle * 1e3 / 1e9
        rows.append({"dtype": str(dtype)[6:], "side": side, "median_ms": middle, "gmacs_per_s": rate})
    return rows


def scoring(bench: Bench) -> list[Row]:
    """Every block's removal on the same rows: all anew, by shared prefixes, channels-last, and compiled."""
    samples = 2 if bench.tiny else 8
    probe = random_probe(bench.config, samples=samples, seed=bench.seed, timesteps=samples)
    unet = bench.model()
    architecture = architecture_of(unet)
    names = [block.name for block in architecture.blocks]
    names = names[::8] if bench.tiny else names
    gone = [gone_with(architecture, [name] if name else [], stand_in=True) for name in ["", *names]]

    cost = ComputeCost()

    def shared(compiled: bool) -> int:
        nonlocal cost
        cost = ComputeCost()
        for _ in predict_without(unet, probe, gone, batch=samples, compute=cost, compiled=compiled):
            pass
        return cost.macs

    def naive() -> int:
        predict(unet, probe, batch=samples)
        for name in names:
            with bypassed(unet, [name], stand_in=True):
                predict(unet, probe, batch=samples)
        return cost.naive_macs  # as the walk before has counted them

    ways: dict[str, tuple[Callable[[], int], torch.memory_format]] = {
        "shared": (partial(shared, False), torch.contiguous_format),
        "naive": (naive, torch.contiguous_format),
        "shared, channels-last": (partial(shared, False), torch.channels_last),
    }
    if not bench.tiny and bench.left > _COMPILING:
        ways["shared, channels-last, compiled"] = (partial(shared, True), torch.channels_last)
    rows: list[Row] = []
    for name, (way, layout) in ways.items():
        unet.to(memory_format=layout)
        start = time.perf_counter()
        macs = way()  # the first also compiles
        synchronize(bench.device)
        first = time.perf_counter() - start
        times = [bench.milliseconds(lambda way=way: way()) for _ in range(2)]  # type: ignore[misc]
        seconds = min(times) / 1e3
        row = {"way": name, "rows": samples, "sets": len(gone), "first_s": first, "seconds": seconds}
        row |= {"gmacs": macs / 1e9, "gmacs_per_s": macs / seconds / 1e9}
        if bench.matrix_rate:
            row["of_matrix_rate"] = macs / seconds / bench.matrix_rate
        rows.append(row)
    slow = next(row["seconds"] for row in rows if row["way"] == "naive")
    return [{**row, "times_naive": slow / row["seconds"]} for row in rows]


def latency(bench: Bench) -> list[Row]:
    """The latency table, eager and compiled, with its error on plans that it was not calibrated with."""
    unet, rows = bench.model(), []
    plans = random_native_plans(architecture_of(unet), 4 if bench.tiny else 8, seed=bench.seed)
    half = len(plans) // 2
    for backend in ("eager", "compiled"):
        if backend == "compiled" and (bench.tiny or bench.left < _COMPILING):
            continue
        start = time.perf_counter()
        table = measure_latency_table(
            unet,
            calibrate=plans[:half],
            held_out=plans[half:],
            rounds=3 if bench.tiny else 100,
            tokens=bench.tokens,
            seed=bench.seed,
            backend=backend,
        )
        row: dict[str, float | int | str | None] = {
            "backend": backend,
            "batch": table.batch,
            "passes": table.whole.runs,
            "median_ms": table.whole.median_ms,
        }
        row |= {"scale": table.scale, "median_error_percent": table.median_error_percent}
        rows.append(
            row | {"worst_error_percent": table.worst_error_percent, "seconds": time.perf_counter() - start}
        )
    return rows


def students(bench: Bench) -> list[Row]:
    """A pass of BK-SDM's students against the teacher's, in turns."""
    architecture = architecture_of(bench.config, tokens=bench.tokens)
    service = Service(str(bench.device), str(bench.dtype)[6:], tokens=bench.tokens)
    plans = {name: parse_plan(name, architecture) for name in PLANS}
    turns = time_plans(architecture, plans, service, rounds=bench.repeats, seed=bench.seed)
    return [{"plan": name, **found.columns()} for name, found in turns.compared().items()]


def _training(bench: Bench, folder: Path, batch: int, count: int) -> tuple[DistillSetup, list[StudentRun]]:
    """A distillation of ``count`` students with made-up data."""
    height, width = latent_shape(bench.config)
    generator = torch.Generator().manual_seed(bench.seed)
    text = bench.tokens, embedding_width(bench.config)
    data = LatentData(
        latents=torch.randn(2 * batch, bench.config["in_channels"], height, width, generator=generator),
        embeddings=torch.randn(2 * batch, *text, generator=generator),
        empty_embedding=torch.randn(*text, generator=generator),
        captions=("",) * (2 * batch),
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    settings = DistillConfig(steps=100, warmup=1, batch=batch, trackers=())
    teacher = bench.model()
    validation = random_probe(bench.config, samples=2, seed=bench.seed)
    setup = DistillSetup(teacher, data, scheduler, settings, validation, bench.device)
    init_processes()
    architecture = architecture_of(teacher)
    runs = []
    for number in range(count):
        plan = parse_plan(PLANS[number % len(PLANS)], architecture)
        build = partial(materialise, teacher, plan)
        student = Student(build, feature_pairs(architecture, plan), folder / str(number))
        runs.append(StudentRun.of(setup, student, build(), {}))
    return setup, runs


def _step(bench: Bench, setup: DistillSetup, runs: Sequence[StudentRun], step: int, micro: int) -> int:
    """One step of training; the samples at a time that fitted."""
    batch = draw_batch(setup.data, setup.scheduler, setup.settings, step, bench.device)
    _, micro = joint.joint_step(setup, runs, batch, micro)
    if failure := next((run.failure for run in runs if run.failure), ""):
        raise RuntimeError(f"a step was not taken: {failure}")
    return micro


def distillation(bench: Bench) -> list[Row]:
    """Samples a second and peak memory of training 1, 2 and 4 students on each pass of the teacher."""
    batch, rows = 2 if bench.tiny else 4, []
    for count in (1, 2, 4):
        try:
            rows.append(_trained(bench, batch, count))
        except (RuntimeError, DeviceError) as error:  # a small card has no room for four
            rows.append({"students": count, "batch": batch, "reason": str(error).splitlines()[0]})
        _let_go(bench.device)
    if all("reason" in row for row in rows):
        raise RuntimeError(rows[0]["reason"])
    return rows


def _trained(bench: Bench, batch: int, count: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        setup, runs = _training(bench, Path(folder), batch, count)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        micro, times = batch, []
        for step in range(1, 2 + (2 if bench.tiny else bench.repeats)):
            synchronize(bench.device)
            start = time.perf_counter()
            micro = _step(bench, setup, runs, step, micro)
            synchronize(bench.device)
            times.append(time.perf_counter() - start)
    middle = statistics.median(times[1:])  # the first warms up
    row: Row = {
        "students": count,
        "batch": batch,
        "step_ms": 1e3 * middle,
        "samples_per_s": count * batch / middle,
    }
    if bench.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
    return row | {"micro_batch": micro, "precision": str(setup.precision())[6:]}


def memory(bench: Bench) -> list[Row]:
    """A step whose batch does not fit: the samples at a time are halved until they do, and the step is taken."""
    with tempfile.TemporaryDirectory() as folder:
        if bench.device.type == "cuda":
            batch = 16
            setup, runs = _training(bench, Path(folder), batch, 1)
            _step(bench, setup, runs, 1, 1)  # the moments of the optimizer are made
            _let_go(bench.device)
            # All that is free is taken but the gradients and two or three samples: on every card the same.
            student: Any = runs[0].state.student
            sample = pass_bytes(student.config, tokens=bench.tokens, training=True)
            spared = int(4 * sum(weight.numel() for weight in student.parameters()) + 2.5 * sample)
            taken = max(0, free_bytes(bench.device) - spared)
            ballast = torch.empty(taken, dtype=torch.uint8, device=bench.device)
            micro = _step(bench, setup, runs, 2, batch)
            del ballast
            return [
                {"batch": batch, "samples_at_a_time": micro, "how": f"{spared / 2**30:.1f} GiB left free"}
            ]
        batch, most = 4, 1
        setup, runs = _training(bench, Path(folder), batch, 1)
        whole = student_losses

        def short(student: Any, output: Any, pairs: Any, chunk: Any, **more: Any) -> Any:
            if len(chunk.timesteps) > most:
                raise RuntimeError("CUDA out of memory. (made up: there is no card)")
            return whole(student, output, pairs, chunk, **more)

        with mock.patch.object(joint, "student_losses", short):
            micro = _step(bench, setup, runs, 1, batch)
        return [{"batch": batch, "samples_at_a_time": micro, "how": f"made up: more than {most} fail"}]


def processes(bench: Bench) -> list[Row]:
    """Forward passes of one process, and of two at the same time on the same card."""
    service = Service(str(bench.device), str(bench.dtype)[6:], tokens=bench.tokens)
    calls = 3 if bench.tiny else 100
    one, two = (
        TimingProcess(bench.config, service, warmup=1, seed=bench.seed, calls=calls) for _ in range(2)
    )
    with one, two:
        # Each alone first: then both have started, and begin their next turn at the same time.
        alone = statistics.median([one.turn(), two.turn()])
        found: dict[int, float] = {}
        failed: list[Exception] = []

        def turn(number: int, process: TimingProcess) -> None:
            try:
                found[number] = process.turn()
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=turn, args=pair) for pair in enumerate((one, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
    together = sum(1e3 / milliseconds for milliseconds in found.values())
    return [
        {"processes": 1, "passes_per_s": 1e3 / alone, "times_one": 1.0},
        {"processes": 2, "passes_per_s": together, "times_one": together * alone / 1e3},
    ]


# Running them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the benchmark, and the seconds that it needs at least on a card."""

    name: str
    run: Callable[[Bench], list[Row]]
    least: float


SECTIONS = (
    Section("matrix", matrix, 5),
    Section("students", students, 20),
    Section("distillation", distillation, 60),
    Section("memory", memory, 20),
    Section("processes", processes, 60),
    Section("scoring", scoring, 60),
    Section("latency", latency, 30),  # the last two compile, where there is time for it
)


def _let_go(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fenced(section: Section, bench: Bench) -> Row:
    """What became of ``section``: its rows, or why there are none; nothing that fails in it ends the others."""
    if bench.left < section.least and not bench.tiny:
        return {
            "status": "left out",
            "reason": f"{bench.left:.0f} s were left, it needs {section.least:.0f} s",
        }
    start = time.perf_counter()
    try:
        rows = section.run(bench)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found: Row = {
            "status": "failed",
            "reason": f"{reason} ({Path(where.filename).name}, line {where.lineno})",
        }
        traceback.print_exc()
    else:
        found = {"status": "done", "rows": rows}
        bench.found[section.name] = rows
    _let_go(bench.device)
    return found | {"seconds": time.perf_counter() - start}


def conditions(bench: Bench) -> Row:
    """The card, the model and what was chosen, as JSON values."""
    found: Row = Environment.capture(str(bench.device), str(bench.dtype)[6:]).as_dict()
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(bench.device)
        found |= {"card": card.name, "card_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    macs = count_macs(bench.config, tokens=bench.tokens).total
    return found | {
        "tiny": bench.tiny,
        "latent": list(latent_shape(bench.config)),
        "tokens": bench.tokens,
        "channels": list(bench.config["block_out_channels"]),
        "gmacs_of_a_pass": macs / 1e9,
        "params": architecture_of(bench.config).total_params,
        "students": {
            name: architecture_of(native_layout(architecture_of(bench.config), plan).config).total_params
            for name in PLANS
            for plan in [parse_plan(name, architecture_of(bench.config))]
        },
        "seed": bench.seed,
        "repeats": bench.repeats,
    }


def as_markdown(values: Mapping[str, Any]) -> str:
    """The results as tables, a line of conditions first."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    said = values["conditions"]
    lines = [
        f"{said.get('card', said['device_name'])}, {said['dtype']}, latent {said['latent'][1]} x {said['latent'][0]}, "
        f"{said['tokens']} tokens, {said['params']:,} parameters, {said['gmacs_of_a_pass']:.4g} GMACs a pass; seed "
        f"{said['seed']}, {said['repeats']} repeats; torch {said['torch']}, diffusers {said['diffusers']}"
    ]
    for name, found in values["sections"].items():
        lines += [
            "",
            f"**{name}**: {found['status']}" + (f", {found['reason']}" if "reason" in found else ""),
        ]
        rows = found.get("rows") or []
        if rows:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run the sections; 1 where one failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="", help="default: bfloat16 on a card, float32 on the CPU")
    parser.add_argument(
        "--tiny", action="store_true", help="a small U-Net and few repeats, to try the program"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="sections that would begin too late are left out"
    )
    parser.add_argument("--only", default="", help=f"some of {','.join(one.name for one in SECTIONS)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for gpu.json and gpu.md")
    chosen = parser.parse_args(words)
    device = pick_device(chosen.device)
    config = dict(resolve_model("sd-v1.4").config)
    bench = Bench(
        device=torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device,
        dtype=pick_dtype(chosen.dtype or ("float32" if device.type == "cpu" else "bfloat16")),
        config=config | TINY if chosen.tiny else config,
        tokens=7 if chosen.tiny else 77,
        tiny=chosen.tiny,
        seed=chosen.seed,
        repeats=2 if chosen.tiny else chosen.repeats,
        until=time.monotonic() + 60 * chosen.minutes,
    )
    only = [name for name in chosen.only.split(",") if name]
    if unknown := set(only) - {section.name for section in SECTIONS}:
        parser.error(f"--only: no section is called {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {"conditions": conditions(bench), "sections": {}}
    write_json(chosen.out / "gpu.json", values)
    for section in SECTIONS:
        if only and section.name not in only:
            continue
        print(f"== {section.name}", flush=True)
        values["sections"][section.name] = fenced(section, bench)
        # After each: what ends the program leaves what was found.
        write_json(chosen.out / "gpu.json", values)
        write_text(chosen.out / "gpu.md", as_markdown(values))
    print(as_markdown(values))
    return int(any(found["status"] == "failed" for found in values["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
