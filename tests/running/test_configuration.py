"""Test the configuration stack: merging, overrides, placeholders, and errors that name the problem."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assemble.commands.main import main
from assemble.reporting.papers import Paper, existing_papers, project_root
from assemble.reporting.records import config_hash
from assemble.stages.cli import build
from assemble.stages.configuration import check_arguments, resolve
from assemble.stages.layers import leaves, merge, place
from assemble.stages.overrides import parse_overrides
from assemble.stages.recipes import family_of
from common.errors import ConfigurationError

trees = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(),
    lambda children: st.dictionaries(st.text("abcd", min_size=1, max_size=2), children, max_size=3),
    max_leaves=8,
)


@given(base=trees, layer=trees)
def test_every_leaf_of_the_later_layer_survives(base: object, layer: object) -> None:
    merged = merge({"root": base}, {"root": layer})
    found = dict(leaves(merged))
    for path, value in leaves({"root": layer}):
        if value != {}:
            assert found[path] == value


def test_a_new_class_drops_the_arguments_of_the_old_one() -> None:
    base = {"model": {"class_path": "a.A", "init_args": {"width": 3, "depth": 4}}}
    layer = {"model": {"class_path": "b.B", "init_args": {"width": 5}}}
    assert merge(base, layer)["model"] == layer["model"]
    same = {"model": {"class_path": "a.A", "init_args": {"width": 5}}}
    assert merge(base, same)["model"]["init_args"] == {"width": 5, "depth": 4}


def test_a_plus_appends_to_a_list() -> None:
    assert merge({"callbacks": [1]}, {"callbacks+": [2, 3]}) == {"callbacks": [1, 2, 3]}
    assert merge({}, {"callbacks+": 2}) == {"callbacks": [2]}


def test_overrides_reach_into_init_args() -> None:
    config = {"model": {"class_path": "a.A", "init_args": {"encoder": {"class_path": "b.B", "init_args": {}}}}}
    assert place(config, "model.encoder.width", 3) == {"model": {"init_args": {"encoder": {"init_args": {"width": 3}}}}}
    assert place(config, "trainer.max_epochs", 3) == {"trainer": {"max_epochs": 3}}


def test_override_syntax() -> None:
    pairs, files = parse_overrides(["--model.temperature", "0.1", "--a=[1, 2]", "--config", "x.yaml", "--n", "-3"])
    assert pairs == [("model.temperature", 0.1), ("a", [1, 2]), ("n", -3)]
    assert files == [Path("x.yaml")]
    # These values contain what YAML reads as a comment, quotes or null.
    pairs, _ = parse_overrides(["--a", "/mine/clips #2", "--b", "'1'", "--c", "--", "--d", "null"])
    assert [value for _, value in pairs] == ["/mine/clips #2", "1", "--", None]


def test_the_stack_in_order() -> None:
    run = resolve("avid", "cma_agreement_union", scale="paper", seed=3, arguments=["--model.loss.temperature", "0.2"])
    assert [layer.name for layer in run.layers] == [
        "configs/trainer.yaml",
        "configs/hardware/cpu.yaml",
        "configs/avid_cma/base.yaml",
        "configs/avid_cma/cma.yaml",
        "configs/avid_cma/cma_agreement_union.yaml",
        "command line model.loss.temperature",
    ]
    arguments = run.config["model"]["init_args"]["loss"]["init_args"]
    assert (arguments["agreement"], arguments["temperature"]) == ("union", 0.2)
    assert run.config["seed_everything"] == 3


@pytest.mark.parametrize("recipe", ["avid/esc50_svm", "avid/dcase_svm", "mct/voc07_svm"])
def test_a_stage_of_one_device_starts_no_launcher(recipe: str) -> None:
    """The stage runs in the process of `reproduce`, and the next stage must still be able to start ranks."""
    paper, name = recipe.split("/")
    one = resolve(paper, name, scale="paper", hardware="gpu8")
    assert (one.config["trainer"]["devices"], one.config["trainer"]["strategy"]) == (1, "auto")
    on_one_card = resolve(paper, name, scale="paper", hardware="gpu1")
    assert config_hash(on_one_card.config) == config_hash(one.config)
    assert resolve("avid", "avid", scale="paper", hardware="gpu8").config["trainer"]["strategy"] == "ddp"


@pytest.mark.parametrize("paper", existing_papers(), ids=lambda paper: paper.name)
def test_a_new_row_is_as_small_as_the_one_that_it_extends(
    paper: Paper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add a row as README and CONTRIBUTING describe: a recipe with a new name that no overlay family lists."""
    shutil.copytree(project_root() / "configs", tmp_path / "configs")
    for tables in project_root().glob("papers/*/tables.yaml"):
        folder = tmp_path / tables.relative_to(project_root()).parent
        folder.mkdir(parents=True)
        shutil.copy(tables, folder)
    monkeypatch.setenv("ASSEMBLE_ROOT", str(tmp_path))
    configs = tmp_path / "configs" / paper.name
    (configs / "mine.yaml").write_text(f"extends: {paper.recipe}\n")
    (configs / "mine_further.yaml").write_text("extends: mine\ntrainer: {gradient_clip_val: 0.5}\n")
    for scale in ("mini", "smoke"):
        extended = resolve(paper.name, paper.recipe, scale=scale)
        mine = resolve(paper.name, "mine", scale=scale)
        assert mine.config == extended.config
        assert mine.deviations == extended.deviations
        further = resolve(paper.name, "mine_further", scale=scale)
        assert further.config == merge(mine.config, {"trainer": {"gradient_clip_val": 0.5}})


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"paper": "avidd"}, "avidd.*avid"),
        ({"recipe": "avod"}, "'avod'.*'avid"),
        ({"arguments": ["--modle.x", "1"]}, "command line.*'modle'.*'model'"),
        ({"arguments": ["stray"]}, "stray"),
        ({"arguments": ["--seed", "--x"]}, "--seed needs a value"),
    ],
)
def test_a_mistake_is_named_with_its_layer_and_the_nearest(call: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){named}"):
        resolve(**{"paper": "avid", "recipe": "avid", "scale": "paper", **call})


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.loss.temprature=1", r"command line.*loss.init_args.temprature'.*'temperature'"),
        ("--trainer.max_epoch=1", r"'trainer.max_epoch'.*'max_epochs'"),
        ("--trainer.batch_size=1", r"'trainer.batch_size'.*--data.batch_size"),
        ("--model.class_path=papers.avid_cma.module.Avid", r"command line.*model.class_path.*cannot be imported"),
        ("--data.batch_size=0", r"command line.*data.batch_size is 0: input should be greater than 0"),
    ],
)
def test_a_wrong_argument_is_named_with_its_layer_and_the_nearest(override: str, named: str) -> None:
    run = resolve("avid", "avid", scale="paper", arguments=[override])
    with pytest.raises(ConfigurationError, match=f"(?s){named}"):
        check_arguments(run.with_placeholders(DATA="data"), run.layers)


def test_a_recipe_takes_no_more_devices_than_its_groups_allow() -> None:
    def devices(hardware: str, *arguments: str, recipe: str = "paper128") -> int:
        run = resolve("xmc_gan", recipe, scale="paper", hardware=hardware, arguments=arguments)
        assert "most_devices" not in run.config
        return run.config["trainer"]["devices"]

    assert devices("gpu8") == devices("slurm") == devices("gpu8", recipe="paper128_best") == 7
    assert devices("gpu1") == 1
    assert devices("gpu8", recipe="xmc_gan") == 8
    assert devices("gpu8", "--trainer.devices", "14") == 14


def test_a_mistake_in_a_recipe_stops_every_command_before_a_stage_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("configs", "papers"):
        shutil.copytree(project_root() / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "*.py"))
    monkeypatch.setenv("ASSEMBLE_ROOT", str(tmp_path))
    tables = tmp_path / "papers" / "avid_cma" / "tables.yaml"
    child = "stages:\n  mine: {recipe: mine, job: pretrain, from: {model.init_args.warm_start: avid}}\n"
    tables.write_text(tables.read_text(encoding="utf-8").replace("stages:\n", child, 1), encoding="utf-8")
    recipe = tmp_path / "configs" / "avid_cma" / "mine.yaml"
    selected = ["avid", "--scale", "smoke", "--stages", "mine", "--runs", str(tmp_path / "runs")]
    for setting in ("instance_cros: 0.1", "instance_cross: hot"):
        recipe.write_text(
            f"extends: avid\nmodel: {{init_args: {{loss: {{init_args: {{{setting}}}}}}}}}\n", encoding="utf-8"
        )
        for command, *options in (["plan"], ["plan", "--format", "slurm"], ["reproduce", "--jobs", "1"]):
            assert main([command, *selected, *options]) == 2
            told = capsys.readouterr()
            assert "mine" in told.err
            assert "instance_cros" in told.err
            assert "sbatch" not in told.out
    assert not list((tmp_path / "runs").rglob("identity.json"))


def test_a_recipe_has_the_settings_of_one_family_and_of_those_that_it_extends() -> None:
    families = {"all": {}, "a": {"extends": "all", "recipes": ["a*"]}, "b": {"extends": ["a", "all"], "recipes": ["b"]}}
    assert family_of("avid", families) == ["all", "a"]
    assert family_of("b", families) == ["all", "a", "b"]
    assert family_of("c", families) == []
    with pytest.raises(ValueError, match="'avid' is in the families a and avid"):
        family_of("avid", {**families, "avid": {}})
    with pytest.raises(ValueError, match="'al'"):
        family_of("b", {"b": {"extends": "al"}, "all": {}})


def test_values_that_are_ours_are_named_with_what_they_are() -> None:
    run = resolve("mct", "mct", scale="paper", arguments=["--model.loss.margin", "0.3"])
    assert "model.loss.margin=0.3" in run.describe_ours()
    assert "ours" not in run.config
    assert resolve("avid", "avid").describe_ours() == ""
    # A class is shown by its name, and fields that the recipe lacks are left out.
    assert resolve("mct", "cross_modal_search", scale="paper").values_of_ours()["model.text_encoder"] == "GRUEncoder"
    assert "model.text_encoder.pretrained" not in resolve("mct", "no_captions", scale="paper").values_of_ours()


def test_one_batch_is_not_a_whole_epoch(tmp_path: Path) -> None:
    run = resolve("mct", "moco_v2", scale="smoke", arguments=["--trainer.limit_train_batches", "1"])
    config = run.with_placeholders(DATA=str(tmp_path), RUN=str(tmp_path))
    config["trainer"]["limit_test_batches"] = 0.5
    cli = build(run, config, {"default_root_dir": str(tmp_path), "logger": False})
    assert cli.trainer.limit_train_batches == 1
    assert isinstance(cli.trainer.limit_train_batches, int)
    assert cli.trainer.limit_test_batches == 0.5
    resolved = cli.resolved()["trainer"]
    assert repr(resolved["limit_train_batches"]) == "1"
    assert resolved["limit_test_batches"] == 0.5
