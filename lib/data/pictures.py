"""Pictures from outside: the formats and modes that people have, as upright RGB.

A picture comes as bytes (a cell of a Parquet table) or as the path of a file. `decode` makes the
square that a run trains on; `digest` names a picture by its bytes and notices a broken one. The
run's own pictures are written whole and need none of this: they are opened by lib/run.py.
"""

import hashlib
import io
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lib.run import PICTURE_FORMATS, atomic, save_image

Encoded = bytes | Path                      # an encoded picture: its bytes, or the file with them

# A file of some kilobytes may unpack to a picture that fills the memory. What Pillow warns of is
# refused here, so its own warning has nothing to add.
MOST_PIXELS = Image.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_picture(encoded: Encoded, draft: bool = False) -> Image.Image:
    """The picture as upright RGB, on white where it is transparent; OSError unless complete.

    A draft of a JPEG is read to its end too, but decoded at an eighth of its size.
    """
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"more than {MOST_PIXELS:,} pixels; make it smaller")
            if draft:
                picture.draft("RGB", (1, 1))

            # A camera may store a picture lying on its side, with a note of how to turn it.
            return as_rgb(ImageOps.exif_transpose(picture))

    except UnidentifiedImageError:
        raise OSError(f"no whole {', '.join(PICTURE_FORMATS)}") from None

    # Pillow's decoders raise nearly every kind of error on broken data.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB."""
    # Nobody says what white is in these, and Pillow would clip them.
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel; save it with 8")

    # Pillow would clip 16-bit grey instead of scaling it.
    if picture.mode.startswith("I;16"):
        picture = picture.point(lambda value: value * (1 / 256)).convert("L")

    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def decode(encoded: Encoded, resolution: int) -> Image.Image:
    """An RGB square of `resolution` pixels; OSError as `read_picture`.

    The short side is resized to `resolution`, bilinearly, and the middle of the long side is kept:
    torchvision's Resize and CenterCrop with the same rounding, in one step.
    """
    picture = read_picture(encoded)
    width, height = picture.size
    left, right = middle(width, min(width, height), resolution)
    top, bottom = middle(height, min(width, height), resolution)

    # Resized from this box alone, the picture is sampled once and needs no crop after it.
    size = (resolution, resolution)
    return picture.resize(size, Image.Resampling.BILINEAR, box=(left, top, right, bottom))


def is_kept_as_it_came(encoded: Encoded, resolution: int) -> bool:
    """Whether a picture is a JPEG that `decode` would leave as it is: its own bytes are the
    smallest file without loss."""
    content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    if not content.endswith(b"\xff\xd9"):
        return False
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
            return (picture.mode, picture.size, turned) == ("RGB", (resolution, resolution), 1)
    except (OSError, ValueError):
        return False


def write_square(encoded: Encoded, path: Path, resolution: int) -> None:
    """Write the picture that `decode` gives, as its path's ending says: `.jpg` are its own bytes
    (`is_kept_as_it_came`), all others are written without loss."""
    if path.suffix != ".jpg":
        save_image(decode(encoded, resolution), path)
        return
    with atomic(path) as temporary:
        temporary.write_bytes(encoded if isinstance(encoded, bytes) else encoded.read_bytes())


def middle(side: int, short_side: int, resolution: int) -> tuple[float, float]:
    """Where the crop starts and ends along a side, in pixels of the original."""
    resized = int(resolution * side / short_side)
    start = round((resized - resolution) / 2)
    end = start + resolution
    return start * side / resized, min(end * side / resized, side)


def digest(encoded: Encoded) -> str:
    """SHA-256 of the picture's bytes, in hexadecimal; OSError unless it is complete."""
    read_picture(encoded, draft=True)
    if isinstance(encoded, Path):
        encoded = encoded.read_bytes()
    return hashlib.sha256(encoded).hexdigest()
