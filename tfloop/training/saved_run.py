"""A run on disk as objects: its settings, its state, and what its data are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tfloop.assembly import make_state
from tfloop.config import CODE, Config
from tfloop.data import spec
from tfloop.data.dataset import Dataset
from tfloop.errors import UserError
from tfloop.state import TrainState
from tfloop.training import checkpoints, code, folders
from tfloop.user_code import is_reference
from tfloop.wording import first_sentence


def open_run(
    folder: str | Path,
    best: bool = False,
    warn: Callable[[str], None] = lambda message: None,
    named: Mapping[str, Any] | None = None,
) -> tuple[Config, TrainState, dict[str, Any]]:
    """(settings, state, manifest) of a run, from its newest checkpoint that is whole.

    The weights are their moving average where the run keeps one.

    Args:
      folder: the run's.
      best: take the checkpoint that did best on the validation images.
      warn: is told of checkpoints that are not whole.
      named: "model", "loss", "metrics" or "dataset" → what stands in the place of the run's own
        where it is not empty. Otherwise the user's own files are taken, as `code.trusted` has it.

    Raises:
      UserError: not a run's folder, or no checkpoint in it is whole.
    """
    folder = Path(folder)
    folders.settings(folder)
    path, manifest = checkpoints.newest(folder / "checkpoints", warn)
    if best:
        if not manifest["best"]:
            raise UserError(
                f"{folder}: has no best checkpoint: the run had no validation images, see "
                "--validation_size"
            )
        path = folder / "checkpoints" / Path(manifest["best"]["checkpoint"]).name
        manifest = checkpoints.read_manifest(path)
    config = _own_code(folder, folders.config_in(manifest, path), named or {})
    of_data = spec_of(manifest)
    try:
        state = make_state(config, of_data, manifest["steps_per_epoch"])
    except UserError:
        raise
    except Exception as error:
        if config.model:  # the user's own code is to be seen
            raise
        reason = first_sentence(error)
        raise UserError(f"{path}: its manifest describes no model: {reason}") from None
    checkpoints.restore(state, path)
    state.adopt_ema()
    return config, state, manifest


def _own_code(folder: Path, config: Config, named: Mapping[str, Any]) -> Config:
    """The settings, with the code that is to be run."""
    given = {name: named[name] for name in CODE if named.get(name)}
    replaced = {name: value for name, value in given.items() if name != "dataset"}
    config = config.replace(**replaced) if replaced else config
    if given.get("dataset"):  # the run's own is not read
        options = config.data_options if _function(given) == _function(vars(config)) else ()
        if named.get("data_options"):
            options = tuple(named["data_options"].split(","))
        config = config.replace(dataset=given["dataset"], data_options=options)
    needed = [name for name in CODE if name != "dataset" or "dataset" in named]
    return code.trusted(folder, config, given, needed=needed)


def _function(settings: Mapping[str, Any]) -> str:
    """The name of the file and function that gives the data; "" where none does."""
    return Path(settings["dataset"]).name if is_reference(settings["dataset"]) else ""


def difference_of_data(manifest: dict[str, Any], data: Dataset) -> str:
    """How a data set differs from what a run had, "does not hold …"; "" where it does not."""
    if manifest.get("fingerprint", data.fingerprint) != data.fingerprint:
        return "does not hold what the run was trained on"
    known, found = manifest.get("held_out_fingerprints", {}), data.held_out_fingerprints
    for part, fingerprint in known.items():  # a trial of a search has no test
        if found.get(part) != fingerprint:
            return f"holds other {part} examples than the run had"
    had = spec_of(manifest).kinds
    for name, target in data.kinds.items():
        if name in had and had[name].names != target.names:
            return f"names the classes {', '.join(target.names) or 'by numbers'}, the run had " + (
                ", ".join(had[name].names) or "numbers"
            )
    return ""


def spec_of(manifest: dict[str, Any]) -> spec.Spec:
    """What the run's data are, from the manifest of a checkpoint."""
    try:
        if "data" in manifest:
            return spec.from_json(manifest["data"])
        return spec.of_images(manifest["image_shape"], manifest["classes"], manifest["pixels"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the manifest of a checkpoint says nothing of its data: {error}") from None
