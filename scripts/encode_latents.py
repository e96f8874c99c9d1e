"""`noisebench encode-latents`: pictures as shards of latents of a VAE, and class names as text embeddings."""

import argparse
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from callbacks.files import write_atomic
from scripts.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

EXAMPLES = """examples:
  noisebench encode-latents --images data/imagenet/train --out data/imagenet256-latents
  noisebench encode-latents --images data/imagenet/val --part val --out data/imagenet256-latents
  noisebench encode-latents --images data/ffhq --vae none --size 64 --out data/ffhq64
  noisebench encode-latents --class-names names.txt --out data/imagenet256-latents

A folder of folders gives labels 0, 1, ... in the order of their names; pictures that lie directly in the folder have
label 0. Whole shards are kept: a command that was cut off continues with the first that is missing."""


def verb(argv: list[str]) -> int:
    """Entry of `noisebench encode-latents`."""
    parser = argparse.ArgumentParser(
        prog="noisebench encode-latents",
        description=(__doc__ or "").partition(": ")[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=Path, help="folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; data.root of the recipes")
    parser.add_argument("--part", default="train", choices=("train", "val"), help="default: train")
    parser.add_argument(
        "--vae",
        default="stabilityai/sd-vae-ft-ema",
        help="hub id or folder of an AutoencoderKL (ID#vae for a subfolder), or none",
    )
    parser.add_argument("--size", type=int, default=256, help="edge length in pixels after the centre crop")
    parser.add_argument("--batch", type=int, default=32, help="pictures per forward pass")
    parser.add_argument("--shard", type=int, default=10_000, help="pictures per file")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirrored pictures as well")
    parser.add_argument("--device", default="cpu", help="e.g. cuda")
    parser.add_argument("--class-names", type=Path, help="one class name a line: writes captions.safetensors")
    parser.add_argument("--text-encoder", default="openai/clip-vit-large-patch14", help="hub id or folder")
    options = parser.parse_args(argv)
    if options.images is None and options.class_names is None:
        raise UserError("give --images, --class-names or both")
    if min(options.size, options.batch, options.shard) < 1:
        raise UserError("--size, --batch and --shard must be at least 1")
    if options.class_names is not None:
        print(f"written: {encode_captions(options.class_names, options.text_encoder, options.out)}")
    if options.images is not None:
        count = encode_folder(options)
        print(f"{count:,} pictures in {options.out}")
    return 0


def encode_folder(options: argparse.Namespace) -> int:
    """Writes the shards of one part; returns the number of pictures.

    Raises:
        UserError: no pictures, no VAE, or the folder holds latents made in another way.
    """
    files, labels, num_classes = list_pictures(options.images)
    vae = None if options.vae == "none" else _vae(options.vae).to(options.device)
    facts = {
        "kind": "pixels" if vae is None else "moments",
        "scale": 1.0 if vae is None else float(vae.config.scaling_factor),
        "num_classes": num_classes,
        "vae": options.vae,
        "size": options.size,
    }
    _agree(options.out / "latents.json", facts)
    for number, first in enumerate(range(0, len(files), options.shard)):
        rows = slice(first, first + options.shard)
        _write_shard(options, f"{options.part}-{number:05d}", files[rows], labels[rows], vae)
    return len(files)


def list_pictures(folder: Path) -> tuple[list[Path], list[int], int]:
    """Picture files, their labels and the number of classes (0 for pictures without folders), in the order of names.

    Raises:
        UserError: there are none.
    """
    if not folder.is_dir():
        raise UserError(f"--images: no folder {folder}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    groups = [sorted(path.rglob("*")) for path in classes] or [sorted(folder.iterdir())]
    pairs = [(file, label) for label, group in enumerate(groups) for file in group if file.suffix.lower() in SUFFIXES]
    if not pairs:
        raise UserError(f"--images: no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return [file for file, _ in pairs], [label for _, label in pairs], len(classes)


def read_square(file: Path, size: int) -> Any:
    """(size, size, 3) uint8: halved by boxes while it is twice too large, shorter side resized, centre cut.

    Source: openai/guided-diffusion, `center_crop_arr` (the ADM crop), which DiT uses.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"--images: cannot read {file}: {error}") from error
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    share = size / min(picture.size)
    picture = picture.resize((round(picture.width * share), round(picture.height * share)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def encode_captions(names: Path, encoder: str, out: Path) -> Path:
    """Last hidden states of a CLIP text encoder for each class name, and for the empty text last.

    Returns:
        `captions.safetensors` with `rows` (number of classes + 1, tokens, width) float16.

    Raises:
        UserError: transformers, the weights or the names are missing.
    """
    import torch
    from safetensors.torch import save

    if importlib.util.find_spec("transformers") is None:
        raise UserError("--class-names needs transformers: pip install 'noisebench[latents]'")
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        texts = [*names.read_text(encoding="utf-8").splitlines(), ""]
        tokenizer, model = CLIPTokenizer.from_pretrained(encoder), CLIPTextModel.from_pretrained(encoder).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names, --text-encoder: {error}") from error
    rows = []
    with torch.no_grad():
        for first in range(0, len(texts), 64):
            tokens = tokenizer(
                texts[first : first + 64],
                padding="max_length",
                max_length=model.config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )
            rows.append(model(tokens.input_ids).last_hidden_state.half())
    write_atomic(out / "captions.safetensors", save({"rows": torch.cat(rows)}))
    return out / "captions.safetensors"


def _vae(name: str) -> Any:
    from lightning_modules.networks.vae import load_vae

    try:
        return load_vae(name)
    except ValueError as error:
        raise UserError(f"--vae: {error}; --vae none stores pictures") from error


def _write_shard(options: argparse.Namespace, name: str, files: list[Path], labels: list[int], vae: Any) -> None:
    """Rows, mirrored rows and labels; the labels come last and mark a whole shard."""
    import numpy as np

    marker = options.out / f"{name}-labels.npy"
    if marker.exists():
        return
    mirrored = options.flip and vae is not None and options.part == "train"
    batches = list(_encoded(files, options, vae, mirrored))
    write_atomic(options.out / f"{name}.npy", _npy(np.concatenate([plain for plain, _ in batches])))
    if mirrored:
        write_atomic(options.out / f"{name}-flipped.npy", _npy(np.concatenate([other for _, other in batches])))
    write_atomic(marker, _npy(np.array(labels, dtype=np.int64)))
    print(f"{name}: {len(files)} pictures", flush=True)


def _encoded(files: list[Path], options: argparse.Namespace, vae: Any, mirrored: bool) -> Iterator[tuple[Any, Any]]:
    """Rows of successive batches and of their mirrored pictures: float16 moments, or the pictures."""
    import numpy as np
    import torch

    @torch.no_grad()
    def moments(pictures: torch.Tensor) -> Any:
        posterior = vae.encode(pictures.to(options.device).float() / 127.5 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu().numpy()

    for first in range(0, len(files), options.batch):
        squares = np.stack([read_square(file, options.size) for file in files[first : first + options.batch]])
        pictures = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
        if vae is None:
            yield pictures.numpy(), None
        else:
            yield moments(pictures), moments(pictures.flip(-1)) if mirrored else None


def _agree(file: Path, facts: dict[str, Any]) -> None:
    """Writes the facts of a new folder, or compares them."""
    if file.exists():
        stored = json.loads(file.read_text())
        if stored != facts:
            raise UserError(f"--out: {file} says {stored}, this command makes {facts}; give another folder")
    else:
        write_atomic(file, json.dumps(facts, indent=1))


def _npy(array: Any) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
