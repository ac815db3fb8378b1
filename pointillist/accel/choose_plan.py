"""From the argument `plan` to the plan that runs, and why."""

import os
from dataclasses import dataclass
from importlib.resources import files

from pointillist.accel.conflicts import AccelerateError, Target
from pointillist.accel.plan import Plan, PlanError


@dataclass(frozen=True)
class Choice:
    plan: Plan | None
    """None: every step is left to Diffusers' own attention."""
    source: str
    """Why this plan, in words."""


def choose_plan(wish: Plan | str | os.PathLike[str], targets: tuple[Target, ...]) -> Choice:
    """`auto` takes the shipped plan that fits the model, else the preset of its family.

    Raises:
        PlanError: the file at the path `wish` is not a plan.
        AccelerateError: the plan was made for another model.
    """
    if isinstance(wish, Plan):
        choice = Choice(wish, "given")
    elif wish == "none":
        choice = Choice(None, "asked for none: Diffusers' own attention, only measured")
    elif wish == "auto":
        choice = _automatic(targets)
    elif isinstance(wish, str | os.PathLike):
        choice = Choice(Plan.load(wish), f"from {os.fspath(wish)}")
    else:
        raise AccelerateError(f"plan is a {type(wish).__name__}; it must be a Plan, the path of one, 'auto' or 'none'")
    if choice.plan is not None:
        for target in targets:
            try:
                choice.plan.check_fits(*_shape(target))
            except PlanError as error:
                raise AccelerateError(f"{error}; give a plan made for it, or plan='auto'") from error
    return choice


def shipped_plans() -> list[Plan]:
    """The plans that come with the package, by file name."""
    folder = files("pointillist.accel.plans")
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return [Plan.from_json(file.read_text(encoding="utf-8")) for file in found]


def _automatic(targets: tuple[Target, ...]) -> Choice:
    model = _shape(targets[0])[0]
    for plan in shipped_plans():
        if plan.model == model:
            return Choice(plan, f"shipped for this model ({model})")
    return Choice(targets[0].family.PRESET, f"no plan is shipped for this model ({model})")


def _shape(target: Target) -> tuple[str, int, int]:
    """Fingerprint, layers and heads."""
    family, transformer = target.family, target.transformer
    return family.fingerprint(transformer), len(family.sites(transformer)), family.heads(transformer)
