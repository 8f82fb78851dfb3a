"""Checks a model's folder before any library opens it: what kind of files it holds, and how large the numbers in its config
are.

The libraries that read tokenizers and configs open what they find and build what they are told to. A config with a billion
layers would make them build a list of a billion names before the first error.
"""

import copy
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upfit.bounded import DATA_BYTES, RECORD_BYTES, check_ordinary, read_json
from upfit.errors import UpfitError

READ_WHOLE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".toml")
LARGE = 2**20  # a list of as many items is made in a moment
# Numbers of elements, so a tensor has as many; unlike positions, bases and ids, which need no tensor.
SIZE = re.compile(r"(^|_)(dim|size|sizes|width|rank|heads|hidden|channels|experts|layers?|blocks|depths?|labels)$")
SAMPLES = re.compile(r"(audio|speech|acoustic)_(\w+_)?chunk_size$")  # sound that is read at once: no tensor has this size
FEW = 64  # of anything that a config counts, twice over to see how it grows

Path_ = tuple[str | int, ...]


def check_model_files(folder: Path) -> None:
    """Raise UpfitError when whoever reads the model in `folder` would wait for ever or fill the memory: for a file that is no
    ordinary one, one too large to be read whole, or a number in config.json that no tensor of the folder can hold."""
    nbytes = 0
    for path in sorted(folder.iterdir()):
        kind = stat.S_IFMT(path.stat().st_mode) if path.exists() else None  # a link to nothing is as good as no file
        if kind not in (stat.S_IFREG, stat.S_IFDIR, None):
            check_ordinary(path)
        if kind == stat.S_IFREG:
            size = path.stat().st_size
            nbytes += size
            if path.suffix in READ_WHOLE and size > DATA_BYTES:
                raise UpfitError(f"{path} has {size} bytes; at most {DATA_BYTES} are read of such a file")
    path = folder / "config.json"
    try:
        config = read_json(path, RECORD_BYTES) if path.exists() else {}
    except UpfitError:
        return  # whoever needs it says so
    if isinstance(config, dict):
        check_numbers(config, nbytes, path)


def check_numbers(config: dict[str, Any], most: int | None = None, path: Path = Path("config.json")) -> None:
    """Raise UpfitError for a number of `config` that is larger than `most` (bytes of the tensors) where it is the size of one,
    or of which the config's class makes a list."""
    large = list(large_numbers(config))
    for place, value in large:
        if most is not None and value > most and _is_of_tensor(str(place[-1])):
            raise UpfitError(f"{path} says {_said(place, value)}, more than the folder's {most} bytes can hold; fetch it again")
    for place, value in large:
        if _is_listed(config, place, [other for other, _ in large]):
            raise UpfitError(f"{path} asks for {_said(place, value)}, and a list as long as that; fetch it again")


def large_numbers(value: Any, at: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    """Where whole numbers above LARGE stand in a config, and what they are."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from large_numbers(item, (*at, key))
    elif isinstance(value, int) and value > LARGE:
        yield at, value


def _is_of_tensor(name: str) -> bool:
    return SIZE.search(name) is not None and SAMPLES.search(name) is None


def _said(place: Path_, value: int) -> str:
    name = ".".join(map(str, place))
    return f"{name} = {value}" if value < 10**30 else f"{name} = more than 10^30"


def _is_listed(config: dict[str, Any], place: Path_, others: list[Path_]) -> bool:
    """Whether the config's class makes more of twice the number at `place`: all large numbers are small ones meanwhile."""
    few = config
    for other in others:
        few = _with(few, other, FEW)
    counts = [_items_made(_with(few, place, number)) for number in (FEW, 2 * FEW)]
    return None not in counts and counts[0] != counts[1]


def _with(config: Any, place: Path_, value: int) -> Any:
    changed: Any = copy.copy(config)
    changed[place[0]] = value if len(place) == 1 else _with(changed[place[0]], place[1:], value)
    return changed


def _items_made(config: dict[str, Any]) -> int | None:
    """Items in all that the class of this config holds; None where there is no class, or it refuses the config."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        with quiet_transformers():
            return _items(CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config)))
    except Exception:  # a class raises whatever it likes on a config that it does not understand
        return None


def _items(value: Any) -> int:
    held = vars(value) if type(value).__module__.startswith("transformers") and hasattr(value, "__dict__") else value
    if isinstance(held, dict):
        return len(held) + sum(map(_items, held.values()))
    return len(held) + sum(map(_items, held)) if isinstance(held, list | tuple) else 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load reports and progress bars: what matters of them is raised as errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if level != logging.CRITICAL:  # setting it makes Python look through every logger that there is
        logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if level != logging.CRITICAL:
            logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
