"""Check that every recipe instantiates at every scale, and that a scale changes only sizes unless it declares more."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from assemble.reporting import render
from assemble.reporting.papers import existing_papers, project_root
from assemble.reporting.records import short_name
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import expand
from assemble.stages.configuration import check_arguments, resolve
from assemble.stages.layers import leaves, load_yaml
from assemble.stages.recipes import family_of, recipes_of, scales_of

OVERLAYS = [(p.name, scale) for p in existing_papers() for scale in scales_of(p.name) if scale != "paper"]


def kind(value: object) -> str:
    """Return a field's value as text: only the type of a number, and `path` for any path."""
    if isinstance(value, str) and {"/", "$"} & set(value):
        return "path"
    return type(value).__name__ if type(value) in (int, float) else repr(value)


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_a_recipe_instantiates(paper: str, tmp_path: Path) -> None:
    """Instantiate each combination of recipe and scale that has a field, class or text that no earlier one has.

    The other combinations differ only in numbers, whose ranges another test checks.
    """
    from assemble.stages.cli import build

    # A network's size depends on the number of AudioSet's classes, so building the network reads this file.
    names = tmp_path / "weights" / "class_labels_indices.csv"
    names.parent.mkdir()
    rows = "".join(f"{number},/m/{number},class {number}\n" for number in range(527))
    names.write_text(f"index,mid,display_name\n{rows}", encoding="utf-8")
    seen: set[tuple[str, str]] = set()
    single = {instance.recipe for instance in expand(paper, "single")}
    for scale, recipe in itertools.product(scales_of(paper), recipes_of(paper)):
        if scale == "single" and recipe not in single:
            continue
        run = resolve(paper, recipe, scale=scale, seed=1)
        check_arguments(run.with_placeholders(DATA="data"), run.layers)
        kinds = {(path, kind(value)) for path, value in leaves(run.config)}
        if kinds <= seen:
            continue
        seen |= kinds
        print(f"{recipe} at {scale}")  # pytest shows it on failure
        config = run.with_placeholders(DATA=str(tmp_path), RUN=str(tmp_path))
        # Networks of the published size would take gigabytes and minutes, so build them without weights.
        with torch.device("meta" if scale in ("paper", "single") else "cpu"):
            cli = build(run, config, {"default_root_dir": str(tmp_path), "logger": False})
        assert type(cli.model).__module__.startswith((f"papers.{paper}.", "common.protocols."))
        assert cli.datamodule.batch_size == run.config["data"]["init_args"]["batch_size"]
        assert cli.resolved()["seed_everything"] == 1


@pytest.mark.parametrize(("paper", "scale"), OVERLAYS)
def test_a_scale_touches_sizes_or_declares_a_deviation(paper: str, scale: str) -> None:
    overlay = load_yaml(project_root() / "configs" / paper / f"{scale}.yaml")
    deviations, sizes = overlay.get("deviations") or [], set(overlay["sizes"])
    used: set[str] = set()
    for deviation in deviations:
        assert deviation["field"]
        assert len(deviation["reason"].split()) > 3
    families, recipes = overlay.get("families") or {}, recipes_of(paper)
    lineages = {recipe: family_of(recipe, families) for recipe in recipes}
    for own in families.values():
        for pattern in own.get("recipes", ()):
            assert fnmatch.filter(recipes, pattern), f"{scale}.yaml: {pattern!r} matches no recipe"
    for name, section in [("", overlay.get("all") or {}), *families.items()]:
        covered = [recipe for recipe in recipes if not name or name in lineages[recipe]]
        assert covered, f"{scale}.yaml: family {name!r} has no recipe"
        section = {key: value for key, value in section.items() if key not in ("recipes", "extends")}
        for path, value in leaves(section) if section else ():
            found = sizes & set(path.split("."))
            used |= found
            if found or path in {"start_from", "trainer.enable_progress_bar", "checkpoint_minutes"}:
                continue
            for recipe in covered:
                declared = [
                    d for d in deviations if d["field"] == path and {*d.get("families", ())} <= {*families}
                    and ("families" not in d or {*d["families"]} & {*lineages[recipe]})
                ]  # fmt: skip
                base = dict(leaves(resolve(paper, recipe, scale="paper").config))
                assert declared or base.get(path) == value, (
                    f"{scale}.yaml sets {path} for {recipe}: neither in its `sizes` nor a declared deviation"
                )
    assert used == sizes, f"{scale}.yaml: `sizes` lists what it does not set: {sorted(sizes - used)}"


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_what_is_ours_names_fields(paper: str) -> None:
    named: set[str] = set()
    fields: set[str] = set()
    for recipe in recipes_of(paper):
        run = resolve(paper, recipe, scale="paper")
        named.update(run.ours)
        paths = [path.replace(".init_args", "") for path, _ in leaves(run.config)]
        # `ours` may name a class or a list, so count every prefix of a leaf's path as a field too.
        fields.update(
            ".".join(parts[:end]) for parts in (path.split(".") for path in paths) for end in range(1, len(parts) + 1)
        )
    assert named <= fields, f"ours: no recipe of {paper} has {sorted(named - fields)}"


#: Recipes that no table uses. Users run these recipes by name, for other protocols or other machines.
BY_NAME = {"avid_single_node", "imagenet_linear_moco", "imagenet_linear_virtex10"}


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_every_recipe_is_one_of_a_stage(paper: str) -> None:
    used = {instance.recipe for scale in scales_of(paper) for instance in expand(paper, scale)}
    extended = {load_yaml(path).get("extends") for path in (project_root() / "configs" / paper).glob("*.yaml")}
    idle = set(recipes_of(paper)) - used - extended
    assert idle <= BY_NAME, f"no stage of papers/{paper}/tables.yaml runs {sorted(idle - BY_NAME)}"


def called_ours(text: str) -> set[str]:
    """Return the fields whose comment says `(ours`, on the same line or on indented lines above."""
    lines = text.splitlines()
    marked, above = set(), False
    for number, line in enumerate(lines):
        above |= "(ours" in line and not line.startswith("#")
        if not line.lstrip().startswith("#"):
            marked |= {number} if above else set()
            above = False

    def fields(node: yaml.Node, path: str) -> Iterator[tuple[int, str]]:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = short_name(f"{path}.{key.value}" if path else key.value)
            yield key.start_mark.line, name
            yield from fields(value, name)

    first: dict[int, str] = {}
    for number, name in fields(yaml.compose(text), ""):
        first.setdefault(number, name)
    return {first[number] for number in marked}


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_what_a_comment_calls_ours_is_listed(paper: str) -> None:
    folder = project_root() / "configs" / paper
    for recipe in ("base", *recipes_of(paper)):
        listed = load_yaml(folder / "base.yaml").get("ours", ()) if recipe == "base" else resolve(paper, recipe).ours
        missing = {
            field
            for field in called_ours((folder / f"{recipe}.yaml").read_text(encoding="utf-8"))
            if not any(f"{one}.".startswith(f"{field}.") or f"{field}.".startswith(f"{one}.") for one in listed)
        }
        assert not missing, f"configs/{paper}/{recipe}.yaml calls {sorted(missing)} ours; list them in `ours:`"


def test_readmes_hold_exactly_what_the_records_say() -> None:
    stale = [str(path) for path in render.stale(render.pages(existing_papers()))]
    assert not stale, f"out of date: {stale}; run `make tables`"


def test_promoted_records_come_from_clean_revisions() -> None:
    for paper in existing_papers():
        for record in find_promoted(paper.name):
            assert record.clean, f"{record.stage} seed {record.seed}: promoted from a changed tree"
