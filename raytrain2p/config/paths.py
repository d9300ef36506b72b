"""What paths are relative to: output, records, models, caches, and the settings files that come with the package."""

import os
from pathlib import Path

from raytrain2p.config.settings import Settings

MODEL_KEYS = ("language_model", "image_encoder", "text_encoder")
PACKAGE = Path(__file__).resolve().parent.parent


def packaged_config(stem: str) -> Path:
    """The YAML file that a command uses without `--config`: inside an installed package, or beside it in a checkout."""
    name = f"{stem}.yaml"
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is neither in {PACKAGE} nor beside it: the installation is incomplete")


def base_directory() -> Path:
    """What relative paths are relative to: `$RAYTRAIN2P_HOME` if set, else the working directory.

    A job submitted with `--working-dir` runs in a copy that Ray deletes later: results would be lost with it. There,
    without the variable, relative paths lie under `~/raytrain2p`.
    """
    if home := os.environ.get("RAYTRAIN2P_HOME"):
        return Path(home).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "raytrain2p" if "runtime_resources" in here.parts else here


def absolute_paths(settings: Settings) -> Settings:
    """Resolve every path here, in the driver: a worker's working directory is Ray's, not the user's."""
    base = base_directory()

    def resolve(text: str) -> str:
        if "://" in text or text.startswith("emoji:"):
            return text
        return str(base / Path(text).expanduser())

    def resolve_records(text: str) -> str:
        """Records are input: they are looked for where the command was typed, not where results are kept."""
        return text if "://" in text or text.startswith("emoji:") else str(Path(text).expanduser().absolute())

    def resolve_model(name: str) -> str:
        """A local directory by its whole path; hub IDs and packaged names as they are."""
        return str(Path(name).expanduser().absolute()) if Path(name).expanduser().is_dir() else name

    models = {key: resolve_model(value) for key, value in settings.model if key in MODEL_KEYS}
    data = settings.data
    store = data.feature_store or os.environ.get("RAYTRAIN2P_FEATURES") or str(cache_directory() / "features")
    uri = settings.tracking.uri
    for scheme in ("sqlite:///", "file:"):
        if uri.startswith(scheme) and not uri.startswith((f"{scheme}/", f"{scheme}//")):
            uri = f"{scheme}{resolve(uri.removeprefix(scheme))}"
    return settings.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "train": resolve_records(data.train),
                    "val": resolve_records(data.val) if data.val else None,
                    "test": {name: resolve_records(source) for name, source in data.test.items()},
                    "feature_store": resolve(store),
                }
            ),
            "model": settings.model.model_copy(update=models),
            "output": settings.output.model_copy(update={"root": resolve(settings.output.root)}),
            "tracking": settings.tracking.model_copy(update={"uri": uri}),
        }
    )


def cache_directory() -> Path:
    """Where models and features are kept between runs: `$RAYTRAIN2P_CACHE`, else the user's cache directory."""
    if explicit := os.environ.get("RAYTRAIN2P_CACHE"):
        return Path(explicit).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raytrain2p"
