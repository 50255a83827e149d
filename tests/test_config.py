"""Settings: what is read is what was written, and a wrong setting is named together with what would work."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prune_lab
from prune_lab.config import (
    SETTINGS,
    DistillConfig,
    EngineConfig,
    EvaluateConfig,
    ProbeConfig,
    ProfileConfig,
    RankConfig,
    RepairConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    SearchConfig,
    changed_settings,
    load_config,
    parse_assignment,
    setting_values,
    to_toml,
    toml_literal,
    with_settings,
)
from prune_lab.config.declaration import CHOICES
from prune_lab.config.toml import RENAMED, config_from_toml
from prune_lab.errors import ConfigError

counts = st.integers(1, 10**12)
weights = st.floats(1e-9, 1e9, allow_nan=False)
fractions = st.floats(0, 1, exclude_max=True)
texts = st.text(max_size=20)
some_text = st.text(min_size=1, max_size=20)
lists = st.lists(texts, max_size=3).map(tuple)

distill_configs = st.builds(
    DistillConfig,
    steps=counts,
    batch=counts,
    learning_rate=weights,
    weight_decay=weights,
    task_weight=weights,
    output_weight=weights,
    feature_weight=weights,
    ema_decay=fractions,
    clip_norm=weights,
    caption_dropout=fractions,
    pictures=counts,
)
configs = st.builds(
    RunConfig,
    model=some_text,
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**63 - 1),
    probe=st.builds(ProbeConfig, samples=st.integers(2, 99), timesteps=counts),
    score=st.builds(
        ScoreConfig,
        criterion=texts,
        groups=st.permutations(["block", "pair", "stage"]).map(lambda kinds: tuple(kinds[:2])),
        race=fractions,
        compile=st.booleans(),
        channels_last=st.booleans(),
    ),
    search=st.builds(
        SearchConfig,
        budgets=lists,
        controls=lists.filter(bool),
        solver=st.sampled_from(["exact", "interactions", "greedy", "descent", "evolution", "learned-gates"]),
        form=st.sampled_from(("native", "neutral", "own")),
        keep=lists,
        quotas=lists,
    ),
    repair=st.builds(RepairConfig, kind=st.sampled_from(["none", "refit"])),
    distill=distill_configs,
    rank=st.builds(
        RankConfig,
        eta=st.sampled_from([0, 2, 3]),
        keep_controls=st.booleans(),
        clip=st.booleans(),
    ),
    engine=st.builds(EngineConfig, kind=st.sampled_from(["local", "ray"]), storage=st.text(max_size=20)),
    evaluate=st.builds(
        EvaluateConfig,
        prompts=lists,
        seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4).map(tuple),
        guidance=weights,
        scorer=some_text,
    ),
    profile=st.builds(ProfileConfig, runs=st.integers(2, 99)),
    report=st.builds(ReportConfig, title=texts, also_presets=lists),
)


@given(configs)
def test_settings_survive_writing_and_reading(config: RunConfig) -> None:
    assert config_from_toml(to_toml(config)) == config


@given(texts)
def test_any_text_is_written_as_toml_that_means_it(text: str) -> None:
    written = to_toml(RunConfig(report=ReportConfig(title=text)))
    assert tomllib.loads(written)["report"]["title"] == text


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load_config(path) == RunConfig()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "sd-v1.4"\n[distill]\nsteps = 7\nlearning_rate = 1\n', encoding="utf-8")
    config = load_config(path)
    assert config == RunConfig(model="sd-v1.4", distill=DistillConfig(steps=7, learning_rate=1.0))
    assert isinstance(config.distill.learning_rate, float)
    assert changed_settings(RunConfig(), config) == ("model", "distill.steps", "distill.learning_rate")


def test_every_setting_is_written() -> None:
    table = tomllib.loads(to_toml(RunConfig()))
    written = {
        f"{name}.{own}" if isinstance(value, dict) else name
        for name, value in table.items()
        for own in (value if isinstance(value, dict) else [""])
    }
    assert written == set(SETTINGS)
    # counted from the dataclasses, so a field that the writer forgets is missed here
    fields = dataclasses.fields(RunConfig)
    tables = [getattr(RunConfig(), field.name) for field in fields]
    expected = sum(len(dataclasses.fields(one)) if dataclasses.is_dataclass(one) else 1 for one in tables)
    assert len(written) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[distill]\nstep = 5", ["distill.step;", "did you mean distill.steps?"]),
        ("modle = 'reference'", ["modle", "did you mean model?"]),
        ("steps = 5", ["no setting steps", "distill.steps or evaluate.steps"]),
        ("[distil]\nsteps = 5", ["distil;", "did you mean distill"]),
        ("[zzzz]\nqqq = 1", ["zzzz", "settings and tables are: data, device"]),
    ],
)
def test_an_unknown_setting_is_met_with_the_nearest_one(text: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_toml(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed = true", "seed = True"),
        ("seed = 1.0", "whole number"),
        ("seed = -1", "at least 0"),
        ("model = 3", "text in quotes"),
        ("model = ''", "model = ''"),
        ("device = 'gpu'", "cuda:N"),
        ("dtype = 'int8'", "bfloat16"),
        ("distill = 3", r"\[distill\]"),
        ("[distill]\nsteps = 0", "at least 1"),
        ("[distill]\nlearning_rate = nan", "finite"),
        ("[distill]\nlearning_rate = 0", "above zero"),
        ("[distill]\nema_decay = 1.0", "below 1"),
        ("[distill]\ntask_weight = 0\noutput_weight = 0\nfeature_weight = 0", "other two weights"),
        ("[score]\ngroups = ['blocks']", "block, pair, triplet, stage"),
        ("[score]\ngroups = 'block'", "list"),
        ("[evaluate]\nseeds = [0, 'one']", "whole number"),
        ("[evaluate]\nseeds = []", "one or more"),
        ("[search]\nbudgets = []\ncontrols = []", "not empty"),
        ("[rank]\neta = 1", "or 2 or more"),
        ("[rank]\neta = -2", "or 2 or more"),
        ("[rank]\nfirst = -1", "at least 0"),
        ("[rank]\nfirst = 501", "no more than distill.steps = 500"),
        ("[engine]\nkind = 'dask'", "local, ray"),
        ("[rank]\nengine = 'ray'", r"rank\.engine is now called engine\.kind"),
        ("[rank]\nstorage = 's3://x'", r"rank\.storage is now called engine\.storage"),
        ("this is not toml", "not TOML"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_rule(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        config_from_toml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(path)


def test_settings_are_checked_however_they_are_made() -> None:
    with pytest.raises(ConfigError, match=r"distill\.batch"):
        DistillConfig(batch=0)


@pytest.mark.parametrize("table", [RunConfig(), DistillConfig(), ProbeConfig()])
def test_settings_do_not_change(table: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.seed = 1


def test_the_demo_says_what_it_means() -> None:
    path = Path(prune_lab.__file__).parent / "demo.toml"
    config = load_config(path)
    assert config.model == "reference"
    assert changed_settings(RunConfig(), config), "a demo that changes nothing has no file to show"


# Settings as data -----------------------------------------------------------------------------------------------


def test_every_setting_says_what_it_means_and_who_reads_it() -> None:
    assert all(setting.meaning and setting.read_by for setting in SETTINGS.values())
    assert [name for name, setting in SETTINGS.items() if setting.free] == [
        *("distill.checkpoint_every", "distill.micro_batch", "distill.together", "distill.trackers"),
        *("distill.grid_every", "engine.address", "engine.storage", "engine.cpus"),
        "profile.anew",
    ]
    assert SETTINGS["distill.seed"].read_by == "data"
    assert SETTINGS["evaluate.guidance"].read_by == "shares"
    assert SETTINGS["search.solver"].choices == CHOICES["search.solver"]


def test_every_choice_is_a_setting_whose_default_is_one_of_them() -> None:
    for name, choices in CHOICES.items():
        assert SETTINGS[name].default in choices


def test_the_kinds_of_repair_are_those_that_the_settings_offer() -> None:
    from prune_lab.repair.reports import RepairKind

    assert ("none", *get_args(RepairKind)) == CHOICES["repair.kind"]


# One setting at a time -------------------------------------------------------------------------------------------


@given(configs)
def test_what_is_written_can_be_assigned(config: RunConfig) -> None:
    values = setting_values(config)
    assignments = [f"{name}={toml_literal(value)}" for name, value in values.items()]
    assert with_settings(RunConfig(), dict(map(parse_assignment, assignments))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("search.solver=greedy", "greedy"),
        ("search.solver = 'greedy'", "greedy"),
        ("report.title=2024", "2024"),
        ("report.title=of x = y", "of x = y"),
        ("search.keep=Md", ("Md",)),
        ("search.quotas=Dn1<=2", ("Dn1<=2",)),
        ("search.budgets=macs<=65%, params<=6,000,000", ("macs<=65%, params<=6,000,000",)),
        ('search.keep=["Md", "Up1"]', ("Md", "Up1")),
        ("search.keep=[]", ()),
        ("evaluate.seeds=3", (3,)),
        ("evaluate.seeds=[3, 4]", (3, 4)),
        ("distill.learning_rate=1", 1.0),
        ("data.flip=true", True),
        ("probe.prompts=", ""),
    ],
)
def test_one_setting_is_read_as_in_toml_without_its_quotes(text: str, value: object) -> None:
    name, found = parse_assignment(text)
    assert (name, found, type(found)) == (text.split("=", maxsplit=1)[0].strip(), value, type(value))


@pytest.mark.parametrize(
    "text", ["data.flip=yes", "evaluate.seeds=one", "distill.steps=1.5", "probe.samples="]
)
def test_a_value_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used; it must be a"):
        parse_assignment(text)


def test_settings_that_only_fit_together_are_set_together() -> None:
    changed = with_settings(RunConfig(), {"data.crop": "random", "data.variants": 4, "seed": 3})
    assert (changed.data.crop, changed.data.variants, changed.seed) == ("random", 4, 3)
    with pytest.raises(ConfigError, match=r"data\.variants"):
        with_settings(RunConfig(), {"data.variants": 4})


def test_a_renamed_setting_says_what_it_is_called_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "distill.iterations", "distill.steps")
    wanted = "setting distill.iterations is now called distill.steps; write that instead"
    with pytest.raises(ConfigError, match=wanted):
        config_from_toml("[distill]\niterations = 5")
    with pytest.raises(ConfigError, match=wanted):
        parse_assignment("distill.iterations=5")
    assert set(RENAMED.values()) <= set(SETTINGS)
