"""`HardwareProfile`: the numbers that say how fast a machine computes attention, and where each one comes from.

Profiles are JSON files: those in `profiles/` ship, `pointillist bench attention --calibrate` measures others.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pointillist.files import write_whole

FOLDER = Path(__file__).parent / "profiles"
KINDS = ("cpu", "cuda", "rocm")
DTYPES = ("float32", "bfloat16", "float16")
MAX_BYTES = 2**20


@dataclass(frozen=True)
class HardwareProfile:
    """A machine as the cost model sees it. Rates are those of the whole machine, times are what is lost."""

    name: str
    kind: str
    """`cpu`, `cuda` or `rocm`."""
    units: int
    """What computes side by side: cores, SMs or CUs."""
    matmul_tflops: Mapping[str, float]
    """Peak of matrix products by dtype, 10¹² operations per second, sums in float32."""
    exp_gps: float
    """Exponentials, 10⁹ per second, with all else that a softmax does to a score."""
    memory_gbs: float
    """10⁹ bytes per second."""
    memory_gib: float
    launch_us: float
    """An operator, whatever its size: microseconds until the next can begin."""
    row_us: float
    """A query block of one head in our sparse attention on one unit, whatever it sees: loading queries, storing."""
    dense_efficiency: float
    """Share of `matmul_tflops` that the products of dense attention reach between its exponentials."""
    sparse_efficiency: float
    """The same of our sparse attention."""
    bias_ps: float
    """What a pair of a query and a mean costs more, 10⁻¹² s: its count is added to the logit."""
    gather_ps: float
    """A number that is moved by an index of its own, beyond its bytes, 10⁻¹² s."""
    sort_ps: float
    """Sorting n numbers takes n·log₂n of these, 10⁻¹² s."""
    sources: Mapping[str, str]
    """Field → where its number is from."""
    error: float | None = None
    """Mean absolute relative error of predicted times on held-out shapes and densities, if it was measured."""

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> str:
        """The profile as a JSON object, the inverse of `from_json`."""
        values = {**asdict(self), "matmul_tflops": dict(self.matmul_tflops), "sources": dict(self.sources)}
        return json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "HardwareProfile":
        """Raises ValueError unless `text` is a valid profile in every value."""
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the hardware profile is not JSON: {error}") from error
        names = {each.name for each in fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"the hardware profile is a JSON {type(values).__name__}; it must be an object")
        if unknown := sorted(set(values) - names):
            raise ValueError(f"the hardware profile has the fields {unknown!r:.200}; allowed are {', '.join(names)}")
        if lacking := sorted(names - set(values) - {"error"}):
            raise ValueError(f"the hardware profile lacks {', '.join(lacking)}")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile, whole or not at all. Raises OSError."""
        write_whole(Path(path), self.to_json().encode())


def profile_names() -> tuple[str, ...]:
    """The profiles that ship."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_profile(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """A profile that ships, by its name, or one in a file (`*.json`).

    Raises:
        ValueError: there is none of this name, or the file is no profile: what is wrong with it.
    """
    text = os.fspath(name_or_path)
    path = FOLDER / f"{text}.json" if text in profile_names() else Path(text)
    if path.suffix != ".json" or not path.is_file():
        names = ", ".join(profile_names())
        raise ValueError(f"there is no hardware profile {text!r:.200}; name one of {names}, or a FILE.json")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the hardware profile {path}: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes; a hardware profile has a few thousand")
    return HardwareProfile.from_json(data)


POSITIVE = ("exp_gps", "memory_gbs", "memory_gib", "dense_efficiency", "sparse_efficiency")
LOSSES = ("launch_us", "row_us", "bias_ps", "gather_ps", "sort_ps")
NUMBERS = ("units", "matmul_tflops", *POSITIVE, *LOSSES)
"""The fields that need a source."""


def _check(profile: HardwareProfile) -> None:
    """Raises ValueError for the first value of `profile` that is not allowed."""
    if not isinstance(profile.name, str) or not 0 < len(profile.name) <= 200:
        raise ValueError(f"name is {profile.name!r:.200}; it must be text of 1 to 200 characters")
    if profile.kind not in KINDS:
        raise ValueError(f"kind is {profile.kind!r:.200}; allowed are {', '.join(KINDS)}")
    if type(profile.units) is not int or not 1 <= profile.units <= 2**16:
        raise ValueError(f"units is {profile.units!r:.200}; it must be a whole number from 1 to {2**16}")
    rates = profile.matmul_tflops
    if not isinstance(rates, Mapping) or not rates or set(rates) - set(DTYPES):
        raise ValueError(f"matmul_tflops is {rates!r:.200}; it must be an object with one or more of {DTYPES}")
    for name, value in rates.items():
        _check_number(f"matmul_tflops of {name}", value, least=1e-6)
    for name in POSITIVE:
        _check_number(name, getattr(profile, name), least=1e-6)
    for name in LOSSES:
        _check_number(name, getattr(profile, name), least=0.0)
    if profile.error is not None:
        _check_number("error", profile.error, least=0.0)
    sources = profile.sources
    if not isinstance(sources, Mapping) or not all(isinstance(x, str) for pair in sources.items() for x in pair):
        raise ValueError(f"sources is {sources!r:.200}; it must be an object of texts by field")
    if unsourced := [name for name in NUMBERS if not sources.get(name, "").strip()]:
        raise ValueError(f"sources lacks {', '.join(unsourced)}; say where these numbers are from")


def _check_number(name: str, value: Any, least: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= 1e9:
        raise ValueError(f"{name} is {value!r:.200}; it must be a number from {least:g} to 1e9")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
