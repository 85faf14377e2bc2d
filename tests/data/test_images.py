"""decode and cover_crop against NumPy and jax.image."""

import io
import struct
import threading
import time
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageFile

from sana_jax.data import images
from sana_jax.data.images import BadImage, Room, cover_crop, decode
from sana_jax.data.transforms import BucketTransform, ImageTransform
from tests import PATIENCE
from tests.data import bad_files
from tests.data.bad_files import HEIGHT, WIDTH, encode, picture

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
USABLE, UNUSABLE = bad_files.usable(), bad_files.unusable()


def distance(image: np.ndarray, other: np.ndarray) -> float:
    assert image.dtype == np.uint8 and image.shape == other.shape
    return np.abs(image.astype(float) - other).max()


@pytest.mark.parametrize("name", USABLE)
def test_every_odd_file_is_decoded(name):
    image = decode(USABLE[name])
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable and image.std() > 5


@pytest.mark.parametrize("name", UNUSABLE)
def test_every_bad_file_is_refused_with_its_reason(name):
    data, reason = UNUSABLE[name]
    with pytest.raises(BadImage, match=f"^{reason}: .") as caught:
        decode(data)
    assert caught.value.reason == reason and reason in images.REASONS


@pytest.mark.parametrize("name", [name for name in UNUSABLE if "bomb" in name])
def test_bombs_are_refused_by_their_header(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match="too_many_pixels"):
        decode(UNUSABLE[name][0])


def test_the_limit_on_pixels_is_the_callers():
    data = USABLE["plain.png"]
    decode(data, max_pixels=WIDTH * HEIGHT)
    with pytest.raises(BadImage, match="too_many_pixels: 48 x 40"):
        decode(data, max_pixels=WIDTH * HEIGHT - 1)
    decode(data, min_side=HEIGHT)
    with pytest.raises(BadImage, match="too_small"):
        decode(data, min_side=HEIGHT + 1)


def test_transparency_lies_on_white():
    alpha = 128 / 255
    blended = picture() * alpha + 255 * (1 - alpha)
    assert distance(decode(USABLE["rgba.png"]), blended) <= 1
    hidden = np.zeros((20, 20, 4), np.uint8)
    hidden[..., 0] = 255  # red that nobody sees
    assert (decode(encode(hidden, "PNG")) == 255).all()
    index = np.array(Image.fromarray(picture()).quantize(64))
    assert (decode(USABLE["palette_clear.png"])[index == 0] == 255).all()
    opaque = decode(USABLE["palette.png"])
    assert (decode(USABLE["palette_clear.png"])[index != 0] == opaque[index != 0]).all()
    red_is_clear = encode(Image.new("RGB", (20, 20), "red"), "PNG", transparency=(255, 0, 0))
    assert (decode(red_is_clear) == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_may_be_transparent(bits):
    values = np.array([[0, 1] * 8] * 16)  # white would not tell
    packed = b"".join(b"\0" + _packed(row, bits) for row in values)
    header = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"tRNS", b"\0\0"),
        (b"IDAT", zlib.compress(packed)),
        (b"IEND", b""),
    ]
    image = decode(chunks_of(b"\x89PNG\r\n\x1a\n", 8, *parts))
    assert (image[values == 0] == 255).all()
    clear = [(kind, b"\0\1" if kind == b"tRNS" else content) for kind, content in parts]
    image = decode(chunks_of(b"\x89PNG\r\n\x1a\n", 8, *clear))
    assert (image[values == 0] == 0).all() and (image[values == 1] == 255).all()


def _packed(row: np.ndarray, bits: int) -> bytes:
    """The samples of a row of a PNG, each of as many bits, the highest first."""
    return np.packbits([int(bit) for value in row for bit in f"{value:0{bits}b}"]).tobytes()


def test_a_palette_that_is_not_there_is_damage():
    rows = zlib.compress(bytes(16 * 17))
    header = struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")
    data = chunks_of(b"\x89PNG\r\n\x1a\n", 8, *parts)
    for function in decode, images.size_of:
        with pytest.raises(BadImage, match="damaged: it has no palette"):
            function(data)


def test_an_orientation_that_there_is_not_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    data = encode(picture(), "JPEG", exif=exif)
    assert images.size_of(data) == decode(data).shape[:2] == (HEIGHT, WIDTH)


def test_cmyk_keeps_its_colours():
    assert distance(decode(USABLE["cmyk.jpg"]), picture()) <= 4


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_grey_is_scaled_and_not_clipped(mode):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    data = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = decode(encode(Image.frombytes(mode, (32, 32), data), "TIFF"))
    assert distance(image, np.round(values[..., None] / 257) + np.zeros(3)) == 0


def test_exif_turns_the_image():
    assert distance(decode(USABLE["turned.jpg"]), picture()) <= 6
    for orientation, turn in ((3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, extra in (("PNG", None), ("PNG", 255)):  # with alpha, too: it must not get lost
            image = Image.fromarray(picture())
            if extra is not None:
                image.putalpha(extra)
            turned = decode(encode(image, kind, exif=exif))
            assert distance(turned, np.rot90(picture(), turn)) == 0


def test_broken_exif_says_nothing():
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", ["animated.webp", "animated.png", "animated.gif"])
def test_the_first_frame_counts(name):
    assert Image.open(io.BytesIO(USABLE[name])).n_frames == 3
    palette = 16 if name.endswith("gif") else 0  # it has 256 colours; the frames are 200 apart
    assert distance(decode(USABLE[name]), picture()) <= palette


def chunks_of(data: bytes, at: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Puts chunks into a PNG: behind its header (at=33), or before its end (at=-12)."""
    made = (
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
        for kind, x in chunks
    )
    return data[:at] + b"".join(made) + data[at:]


ZEROS = zlib.compress(bytes(3 << 20))  # three times what Pillow reads of one text
TURN = b'<x tiff:Orientation="6"/>'
XMP = b"XML:com.adobe.xmp\0"


@pytest.mark.parametrize("at", [33, -12])
@pytest.mark.parametrize(
    "kind, content",
    [
        (b"zTXt", b"Comment\0\0" + ZEROS),
        (b"iTXt", b"Comment\0\1\0en\0\0" + ZEROS),
        (b"iTXt", XMP + b"\1\0\0\0" + ZEROS),
        (b"tEXt", b"Comment\0" + b"x" * (65 << 20)),
        (b"iCCP", b"ICC Profile\0\0" + ZEROS),
        (b"iCCP", b"ICC Profile\0\7" + b"of no known method"),
        (b"mkBF", b"an editor's layers"),
    ],
    ids=lambda value: value[:4].decode() if len(value) == 4 else "",
)
def test_what_image_editors_add_to_a_png_does_not_matter(kind, content, at):
    for name in "plain.png", "rgba.png", "palette_clear.png", "sixteen_bit.png", "animated.png":
        with_notes = chunks_of(USABLE[name], at, (kind, content))
        assert (decode(with_notes) == decode(USABLE[name])).all(), name
        assert images.size_of(with_notes) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("at", [33, -12])
@pytest.mark.parametrize(
    "kind, content",
    [
        (b"iTXt", XMP + b"\0\0\0\0" + TURN),
        (b"iTXt", XMP + b"\1\0x\0x\0" + zlib.compress(TURN)),
        (b"iTXt", XMP + b"\0\0\0\0" + TURN + bytes(2 << 20)),
        (b"zTXt", XMP + b"\0" + zlib.compress(TURN)),
    ],
)
def test_notes_that_say_which_way_is_up_are_read(kind, content, at):
    turned = chunks_of(USABLE["plain.png"], at, (kind, content), (b"zTXt", b"x\0\0" + ZEROS))
    assert (decode(turned) == np.rot90(picture(), 3)).all()
    assert images.size_of(turned) == (WIDTH, HEIGHT)


def test_large_images_wait_in_turn_until_there_is_room():
    room, order, release = Room(4), [], threading.Event()

    def take(name: str, share: int):
        with room.taken(share):
            order.append(f"{name} of {room._used}")
            assert name != "first" or release.wait(PATIENCE)

    def start(name: str, share: int, until) -> threading.Thread:
        thread = threading.Thread(target=take, args=(name, share), daemon=True)
        thread.start()
        end = time.monotonic() + PATIENCE
        while not until() and time.monotonic() < end:
            time.sleep(1e-3)
        return thread

    threads = [
        start("first", 3, lambda: order),
        start("larger than all", 9, room._turn.locked),
        start("small", 1, lambda: True),  # there is room, but it is not its turn
    ]
    assert order == ["first of 3"]
    release.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order == ["first of 3", "larger than all of 4", "small of 1"] and room._used == 0


def test_pixels_are_decoded_and_cut_where_there_is_room(monkeypatch):
    used = []
    monkeypatch.setattr(images, "_ROOM", room := Room(10**6))
    for name in "_rgb", "cover_crop":
        whole = getattr(images, name)

        def watched(*args, whole=whole, **options):
            used.append(room._used)
            return whole(*args, **options)

        monkeypatch.setattr(images, name, watched)
    record = {"image": USABLE["plain.png"]}
    rng = np.random.default_rng(0)
    for transform in ImageTransform(16, 16), BucketTransform(((16, 16), (16, 32))):
        assert transform(record, rng)["image"].shape[0] == 16
    assert used == [WIDTH * HEIGHT] * 4
    decode(USABLE["rgba.png"])
    assert used[4:] == [2 * WIDTH * HEIGHT]
    for name in "half.png", "flipped.png", "lab.tiff":
        with pytest.raises(BadImage):
            decode(UNUSABLE[name][0])
    assert room._used == 0


def test_any_cut_and_any_flipped_byte_gives_an_image_or_a_reason():
    rng = np.random.default_rng(0)
    for name in ("plain.jpg", "rgba.png", "rgba.webp", "animated.gif", "lzw.tiff", "turned.jpg"):
        data = USABLE[name]
        for _ in range(40):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            broken[rng.integers(len(broken))] = rng.integers(256)
            try:
                assert decode(bytes(broken)).shape[2] == 3
            except BadImage as error:
                assert error.reason in images.REASONS


def resample(image: np.ndarray, height: int, width: int, top: float, left: float, scale: float):
    """jax.image's antialiased cubic convolution (Keys, a = -1/2): rounded and clipped."""
    with jax.enable_x64(True):
        result = jax.image.scale_and_translate(
            np.float64(image),
            (height, width, 3),
            (0, 1),
            np.array([scale, scale]),
            np.array([-top * scale, -left * scale]),
            "cubic",
        )
    return np.clip(np.round(np.asarray(result)), 0, 255)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (13, 30), (39, 20)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cover_crop_is_an_antialiased_resize(size, seed):
    # Pillow rounds to 8 bits between the two directions, and clips: keep away from 0 and 255
    image = np.random.default_rng(5).integers(64, 192, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    rng = None if seed is None else np.random.default_rng(seed)
    x, y = (0.5, 0.5) if seed is None else np.random.default_rng(seed).random(3)[:2]
    scale = max(size[0] / HEIGHT, size[1] / WIDTH)
    top, left = y * (HEIGHT - size[0] / scale), x * (WIDTH - size[1] / scale)
    expected = resample(image, *size, top, left, scale)
    ours = cover_crop(image, *size, rng)
    assert ours.shape == (*size, 3) and ours.flags.c_contiguous
    assert distance(ours, expected) <= 1


def test_cover_crop_at_the_size_that_it_has_copies():
    image = picture()
    assert (cover_crop(image, HEIGHT, WIDTH) == image).all()
    assert (cover_crop(image, HEIGHT, WIDTH - 8) == image[:, 4:-4]).all()
    mirrored = [
        cover_crop(image, HEIGHT, WIDTH, np.random.default_rng(seed), flip=True)
        for seed in range(200)
    ]
    same = sum((crop == image).all() for crop in mirrored)
    turned = sum((crop == image[:, ::-1]).all() for crop in mirrored)
    assert same + turned == 200 and 70 < turned < 130


def test_rounding_never_leads_out_of_the_image():
    rng = np.random.default_rng(0)
    for _ in range(500):
        have, want = rng.integers(20, 90, 2), rng.integers(5, 20, 2)
        image = np.zeros((*have, 3), np.uint8)
        assert cover_crop(image, *want, rng).shape == (*want, 3)
        assert cover_crop(image, *(4 * want), rng, upscale=True).shape == (*(4 * want), 3)


def test_patches_are_parts_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(image, (6, 7), (0, 1))
    windows = {
        np.ascontiguousarray(w).tobytes() for w in np.moveaxis(windows, 2, -1).reshape(-1, 6, 7, 3)
    }
    seen = {
        cover_crop(image, 6, 7, np.random.default_rng(seed), resize=False).tobytes()
        for seed in range(400)
    }
    assert seen == windows and len(seen) == 4 * 5


def test_nothing_is_enlarged_unasked():
    image = picture()
    for height, width in ((HEIGHT + 1, 8), (8, WIDTH + 1)):
        with pytest.raises(BadImage, match="too_small: 48 x 40, where"):
            cover_crop(image, height, width)
        assert cover_crop(image, height, width, upscale=True).shape == (height, width, 3)
        with pytest.raises(BadImage, match="too_small"):
            cover_crop(image, height, width, resize=False, upscale=True)
