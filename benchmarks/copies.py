"""Copies planted among photographs, and which of them are found: by `dino curate`, imagededup and cleanvision.

    python benchmarks/copies.py plant CALTECH.zip FOLDER          # 1,500 photographs, and copies of 50 for each change
    dino curate data.root=FOLDER/pool weights=W run.dir=FOLDER/curated rebalance.method=none
    python benchmarks/copies.py dino FOLDER/curated/manifest.parquet FOLDER/dino.json
    python benchmarks/copies.py phash FOLDER/pool FOLDER/phash.json           # where imagededup is installed
    python benchmarks/copies.py cleanvision FOLDER/pool FOLDER/cleanvision.json
    python benchmarks/copies.py table FOLDER/*.json

A copy counts as found where it is put together with its photograph, directly or through other copies. What is put
together that has not been planted is counted too, though Caltech-101 holds some copies of its own.
"""

import io
import json
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

PHOTOGRAPHS, COPIED = 1500, 50


def recoded(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, part: float, place: float) -> Image.Image:
    """A fraction of each side; `place` 0: from the upper left corner, 0.5: the middle."""
    width, height = image.size
    left, top = place * (1 - part) * width, place * (1 - part) * height
    return image.crop((round(left), round(top), round(left + part * width), round(top + part * height)))


def marked(image: Image.Image, width: float, text: str) -> Image.Image:
    """Half-transparent text in the middle, over a fraction of the width."""
    layer = Image.new("RGBA", image.size)
    font = ImageFont.load_default(size=max(8, round(width * image.width / len(text) * 1.8)))
    ImageDraw.Draw(layer).text((image.width / 2, image.height / 2), text, (255, 255, 255, 150), font, anchor="mm")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def logo(image: Image.Image) -> Image.Image:
    changed = image.copy()
    width, height = image.size
    ImageDraw.Draw(changed).rectangle((0.82 * width, 0.88 * height, 0.98 * width, 0.97 * height), (200, 30, 30))
    return changed


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": recoded,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "other shape (4:3 to 1:1)": lambda image: image.resize(
        (min(image.size), min(image.size)), Image.Resampling.BICUBIC
    ),
    "30 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "in grey": lambda image: image.convert("L").convert("RGB"),
    "crop to 95 %": lambda image: cropped(image, 0.95, 0.5),
    "crop to 90 %": lambda image: cropped(image, 0.9, 0.5),
    "crop to 80 %": lambda image: cropped(image, 0.8, 0.5),
    "crop to 80 %, a corner": lambda image: cropped(image, 0.8, 0.0),
    "border of 5 %": lambda image: ImageOps.expand(image, round(0.05 * image.width), (0, 0, 0)),
    "logo in a corner": logo,
    "mark across the middle": lambda image: marked(image, 0.8, "SAMPLE"),
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "turned by 90°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
}


def plant(archive: str, folder: str) -> None:
    """`folder`/pool: photographs as 00123.png, and copies of some as 00123~4.png, 4 being the number of the change."""
    pool = Path(folder) / "pool"
    pool.mkdir(parents=True)
    with zipfile.ZipFile(archive) as photographs:
        names = sorted(name for name in photographs.namelist() if name.lower().endswith(".jpg"))
        order = np.random.default_rng(0).permutation(len(names))[:PHOTOGRAPHS]
        for place, index in enumerate(order.tolist()):
            image = Image.open(io.BytesIO(photographs.read(names[index]))).convert("RGB")
            image.save(pool / f"{index:05d}.png")
            for number, change in enumerate(CHANGES.values()):
                if place // COPIED == number:
                    change(image).save(pool / f"{index:05d}~{number:02d}.png")
    print(f"{len(list(pool.iterdir())):,} images, {len(CHANGES) * COPIED} of them copies")


def by_dino(manifest: str) -> list[tuple[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(manifest, columns=["path", "duplicate_of"]).to_pylist()
    return [(row["path"], row["duplicate_of"]) for row in table if row["duplicate_of"]]


def by_hash(pool: str, method: str) -> list[tuple[str, str]]:
    from imagededup import methods

    found = getattr(methods, method)().find_duplicates(image_dir=pool)
    return [(name, other) for name, others in found.items() for other in others]


def by_cleanvision(pool: str) -> list[tuple[str, str]]:
    from cleanvision import Imagelab

    lab = Imagelab(data_path=pool)
    lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}}, verbose=False)
    pairs = []
    for kind in ("exact_duplicates", "near_duplicates"):
        for group in lab.info.get(kind, {}).get("sets", []):
            names = [Path(name).name for name in group]
            pairs += [(names[0], name) for name in names[1:]]
    return pairs


def score(pairs: Iterable[tuple[str, str]], seconds: float) -> dict:
    """How many planted copies of each change are in their photograph's group, and how many other pairs there are."""
    neighbours = defaultdict(set)
    for one, other in pairs:
        neighbours[one].add(other)
        neighbours[other].add(one)
    found, others, seen = dict.fromkeys(CHANGES, 0), 0, set()
    changes = list(CHANGES)
    for start in list(neighbours):
        if start in seen:
            continue
        group, waiting = set(), [start]
        while waiting:
            name = waiting.pop()
            if name not in group:
                group.add(name)
                waiting += neighbours[name]
        seen |= group
        photographs = {name[:5] for name in group}
        others += len(photographs) - 1
        for name in group:
            if "~" in name and f"{name[:5]}.png" in group:
                found[changes[int(name[6:8])]] += 1
    return {"found": found, "others": others, "seconds": seconds}


def table(files: list[str]) -> None:
    results = {Path(file).stem: json.loads(Path(file).read_text(encoding="utf-8")) for file in files}
    print("| of 50 copies each | " + " | ".join(results) + " |\n|---" + "|---:" * len(results) + "|")
    for change in CHANGES:
        print(f"| {change} | " + " | ".join(str(result["found"][change]) for result in results.values()) + " |")
    print("| different photographs put together | " + " | ".join(str(r["others"]) for r in results.values()) + " |")
    print("| seconds | " + " | ".join(f"{r['seconds']:.0f}" for r in results.values()) + " |")


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "plant":
        plant(*arguments)
    elif command == "table":
        table(arguments)
    else:
        start = time.perf_counter()
        ways = {"phash": "PHash", "dhash": "DHash", "cnn": "CNN"}
        if command == "dino":
            pairs = by_dino(arguments[0])
        elif command == "cleanvision":
            pairs = by_cleanvision(arguments[0])
        else:
            pairs = by_hash(arguments[0], ways[command])
        result = score(pairs, time.perf_counter() - start)
        Path(arguments[1]).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
