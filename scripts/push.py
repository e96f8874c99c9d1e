"""`noisebench push`: a run's adapter to the Hugging Face hub, only ever by this command."""

import argparse
import json
import re
from pathlib import Path

from scripts.errors import UserError
from scripts.trained_lm import offline, run_config

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def verb(argv: list[str]) -> int:
    """Entry of `noisebench push`."""
    parser = argparse.ArgumentParser(
        prog="noisebench push",
        description="Uploads the folder `adapter` of a run (or the whole model where no LoRA was used) to a repository "
        "of the Hugging Face hub, with a model card. Needs `hf auth login` or HF_TOKEN. Nothing else in noisebench "
        "uploads.",
        epilog="example: noisebench push runs/noisefit/llama-3.2-1b-auto/HASH/seed0 --to me/llama-noisefit --dry-run",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run with adapter/")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository on the hub, made where missing")
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="says what would be sent, and sends nothing")
    options = parser.parse_args(argv)
    if not NAME.fullmatch(options.to):
        raise UserError(f"--to must be OWNER/NAME, got {options.to!r}")
    files = to_send(options.run)
    size = sum(path.stat().st_size for path in files)
    card = model_card(options.run)
    names = ", ".join(sorted({"README.md", *(path.name for path in files)}))
    what = f"{names} ({size / 1e6:.1f} MB) of {options.run / 'adapter'} to {options.to}"
    if options.dry_run:
        print(f"would send {what}; README.md:\n\n{card}")
        return 0
    if offline():
        raise UserError("HF_HUB_OFFLINE forbids to use the hub; unset it to push")
    print(f"sent {what}: {upload(options.run / 'adapter', options.to, not options.public, card)}")
    return 0


def to_send(run: Path) -> list[Path]:
    """Files of a run's adapter, without the card that peft writes.

    Raises:
        UserError: there are none.
    """
    files = sorted(path for path in (run / "adapter").glob("*") if path.is_file() and path.name != "README.md")
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"RUN must have weights in {run / 'adapter'}; callbacks.save_adapter.SaveAdapter writes them")
    return files


def model_card(run: Path) -> str:
    """README.md of the repository: base model, recipe, method."""
    settings = run_config(run)
    model = settings["model"]["init_args"]
    base = model["lm"]["init_args"].get("source")
    known = [f"base_model: {base}", "library_name: peft"] if _is_on_the_hub(base) else []
    header = ["---", *known, "tags: [noisebench]", "---"]
    recipe = "/".join(run.resolve().parts[-4:-2])
    facts = [f"{name}: `{model[name]}`" for name in ("loss_mode", "variant", "selection", "noise_std") if name in model]
    return "\n".join([*header, "", f"# {recipe}", "", f"Trained with noisebench, recipe `{recipe}`.", "", *facts, ""])


def _is_on_the_hub(base: str | None) -> bool:
    """A file or folder of this machine is no name there."""
    return base is not None and NAME.fullmatch(base) is not None and not Path(base).exists()


def sent_config(folder: Path) -> bytes | None:
    """adapter_config.json as it is sent, without a base model that only this machine has; None where there is none."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text())
    if not _is_on_the_hub(settings.get("base_model_name_or_path")):
        settings["base_model_name_or_path"] = None
    return json.dumps(settings, indent=2).encode()


def upload(folder: Path, name: str, private: bool, card: str) -> str:
    """Sends a folder and a card to the repository `name`; returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["README.md", "adapter_config.json"])
        for file, content in (("README.md", card.encode()), ("adapter_config.json", sent_config(folder))):
            if content is not None:
                api.upload_file(repo_id=name, path_or_fileobj=content, path_in_repo=file)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"--to {name}: the hub did not take it: {error}") from error
    return str(address)
