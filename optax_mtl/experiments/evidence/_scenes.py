"""Dense prediction without a download: scenes with exact truth in the colours of real photographs, and a real one.

A scene is a floor, a wall, and a few balls and boxes, seen by a pinhole camera. Every surface wears a crop of a real
photograph and is lit from one side. As the scene is computed, class, depth and normal of each pixel are exact.

The real one is the left picture of the pair *Motorcycle* of Middlebury's stereo data sets (Scharstein et al., GCPR
2014), with the disparity that was measured at each pixel. It comes with scikit-image.
"""

from collections.abc import Sequence
import functools
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 32  # pixels of an image
CLASSES = ("floor", "wall", "ball", "box")
LAYERS = ("near", "middle", "far")  # the real photograph's
UNKNOWN = -1  # the class of a pixel without truth
PHOTOGRAPHS = {  # files of installed packages
    "astronaut": ("skimage.data", "astronaut.png"),
    "brick": ("skimage.data", "brick.png"),
    "camera": ("skimage.data", "camera.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "coins": ("skimage.data", "coins.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "rocket": ("skimage.data", "rocket.jpg"),
}

_HALF_VIEW = np.tan(np.radians(30))  # of 60 degrees
_TEXELS = 16  # of a side of a texture
_TEXELS_PER_METRE = 8.0  # about one a pixel at three metres
_BALLS = _BOXES = 2  # at most

# Of the camera of the pair, as scikit-image tells: in pixels of the picture, and metres.
_FOCAL, _CENTRE, _OFFSET, _BASELINE = 994.978, (311.193, 254.877), 31.086, 0.193001
_STRIDE = 4  # the picture is taken at a quarter of its size
_TRAIN_COLUMNS, _TEST_COLUMNS = slice(0, 112), slice(120, 185)


class Scenes(NamedTuple):
    """Images and their truth.

    Attributes:
      images: `(N, SIDE, SIDE, 3)` float32 in [0, 1].
      classes: `(N, SIDE, SIDE)` int32, or `UNKNOWN`: a pixel that nothing is known about, depth and normal included.
      depth: `(N, SIDE, SIDE)` float32, in metres along the camera's axis.
      normals: `(N, SIDE, SIDE, 3)` float32, of length one, towards the camera: x right, y down, z away from it.
    """

    images: np.ndarray
    classes: np.ndarray
    depth: np.ndarray
    normals: np.ndarray


class Split(NamedTuple):
    """What is trained on and what is not."""

    train: Scenes
    test: Scenes


def scenes(seed: int, train_size: int, test_size: int) -> Split:
    """Rendered scenes, the same for the same seed; no photograph is in training and test scenes.

    Args:
      seed: decides the split of the photographs and the scenes.
      train_size: number of training scenes.
      test_size: number of test scenes.

    Returns:
      A `Split`, with `CLASSES` for classes.
    """
    rng = np.random.default_rng([seed, 2])
    train, test = split_photographs(seed)
    return Split(_render(rng, train, train_size), _render(rng, test, test_size))


def split_photographs(seed: int) -> tuple[list[str], list[str]]:
    """Names of the photographs for training, two thirds, and for the test."""
    names = [str(name) for name in np.random.default_rng([seed, 3]).permutation(list(PHOTOGRAPHS))]
    return names[: 2 * len(names) // 3], names[2 * len(names) // 3 :]


@functools.cache
def photograph(name: str) -> np.ndarray:
    """A photograph of `PHOTOGRAPHS`, `(H, W, 3)` uint8."""
    return _read(*PHOTOGRAPHS[name])


def _read(package: str, file: str) -> np.ndarray:
    """A picture that an installed package has brought along."""
    path = resources.files(package) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"The installed {package.split('.')[0]} has no {file}. Install another version: "
            "pip install 'scikit-image>=0.25' 'scikit-learn>=1.5'."
        )
    with resources.as_file(path) as opened, Image.open(opened) as image:
        return np.asarray(image.convert("RGB"))


# -- Rendered ------------------------------------------------------------------


class _Hits(NamedTuple):
    """Where the rays meet a surface: `(N, P)` each, and a last axis.

    Attributes:
      depth: infinite where a ray misses it.
      normals: in the world.
      at: in metres along the surface, `(N, P, 2)`.
    """

    depth: np.ndarray
    normals: np.ndarray
    at: np.ndarray


def _render(rng: np.random.Generator, photographs: Sequence[str], number: int) -> Scenes:
    """So many scenes. In the world, too, x is right and y down; the camera stands at zero, and looks down a little."""
    pitch = np.radians(rng.uniform(5, 20, number))
    sin, cos, zero = np.sin(pitch), np.cos(pitch), np.zeros(number)
    axes = np.array([[zero + 1, zero, zero], [zero, cos, -sin], [zero, sin, cos]]).transpose(2, 0, 1)  # the camera's
    across = _HALF_VIEW * ((np.arange(SIDE) + 0.5) / (SIDE / 2) - 1)
    x, y = np.meshgrid(across, across)
    seen = np.stack(
        [x.ravel(), y.ravel(), np.ones(SIDE**2)], axis=1
    )  # (P, 3), so that depth is what it is multiplied by
    rays = seen @ axes  # (N, P, 3)

    height = rng.uniform(1.2, 1.8, number)
    surfaces = [_floor(rays, height), _wall(rng, rays)]
    surfaces += [_ball(rng, rays, height) for _ in range(_BALLS)] + [_box(rng, rays, height) for _ in range(_BOXES)]
    kinds = np.array([0, 1] + [2] * _BALLS + [3] * _BOXES)

    nearest = np.argmin([s.depth for s in surfaces], axis=0)  # (N, P)

    def pick(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.take_along_axis(np.stack(values), nearest[None, ..., None], axis=0)[0]

    normals = pick([s.normals for s in surfaces])
    colors = _colors(rng, photographs, nearest, pick([s.at for s in surfaces]), len(surfaces))
    light = np.stack([rng.uniform(-1, 1, number), -rng.uniform(0.5, 1.5, number), -rng.uniform(0.2, 1, number)], axis=1)
    light /= np.linalg.norm(light, axis=1, keepdims=True)
    ambient = rng.uniform(0.2, 0.35, (number, 1))
    shade = ambient + (1 - ambient) * np.maximum(np.einsum("npk,nk->np", normals, light), 0)
    images = colors * shade[..., None] + rng.normal(scale=0.02, size=colors.shape)

    square = (number, SIDE, SIDE)
    return Scenes(
        images=np.clip(images, 0, 1).astype(np.float32).reshape(*square, 3),
        classes=kinds[nearest].astype(np.int32).reshape(square),
        depth=np.min([s.depth for s in surfaces], axis=0).astype(np.float32).reshape(square),
        normals=(normals @ axes.transpose(0, 2, 1)).astype(np.float32).reshape(*square, 3),
    )


def _colors(
    rng: np.random.Generator, photographs: Sequence[str], surface: np.ndarray, at: np.ndarray, surfaces: int
) -> np.ndarray:
    """`(N, P, 3)`: every surface of every scene has a texture of its own, which goes on mirrored at its edges."""
    bank = _textures(rng, photographs, 256)
    number = len(surface)
    texture = np.take_along_axis(rng.integers(len(bank), size=(number, surfaces)), surface, axis=1)
    texel = np.floor(_TEXELS_PER_METRE * at + rng.integers(_TEXELS, size=(number, 1, 2))).astype(int) % (2 * _TEXELS)
    texel = np.minimum(texel, 2 * _TEXELS - 1 - texel)
    return bank[texture, texel[..., 1], texel[..., 0]]


def _textures(rng: np.random.Generator, photographs: Sequence[str], number: int) -> np.ndarray:
    """Square crops of 48 to 192 pixels, averaged down, and brightened a little, so that shading can be seen."""
    bank = np.empty((number, _TEXELS, _TEXELS, 3))
    for texture in bank:
        image = photograph(photographs[int(rng.integers(len(photographs)))])
        factor = int(rng.integers(3, 13))
        side = factor * _TEXELS
        top, left = rng.integers(image.shape[0] - side + 1), rng.integers(image.shape[1] - side + 1)
        crop = image[top : top + side, left : left + side].reshape(_TEXELS, factor, _TEXELS, factor, 3)
        texture[:] = 0.3 + 0.7 * crop.mean(axis=(1, 3)) / 255
    return bank


def _floor(rays: np.ndarray, height: np.ndarray) -> _Hits:
    down = rays[..., 1]
    depth = np.divide(height[:, None], down, out=np.full_like(down, np.inf), where=down > 0)
    depth = np.where(depth < 100, depth, np.inf)  # the horizon is behind the wall
    finite = np.where(np.isfinite(depth), depth, 0)
    return _Hits(depth, np.broadcast_to([0.0, -1.0, 0.0], rays.shape), finite[..., None] * rays[..., [0, 2]])


def _wall(rng: np.random.Generator, rays: np.ndarray) -> _Hits:
    """Upright, at four to five and a half metres, turned by up to 25 degrees."""
    turn = np.radians(rng.uniform(-25, 25, len(rays)))
    away = rng.uniform(4, 5.5, len(rays))
    normal = np.stack([np.sin(turn), np.zeros(len(rays)), -np.cos(turn)], axis=1)[:, None]
    along = np.stack([np.cos(turn), np.zeros(len(rays)), np.sin(turn)], axis=1)[:, None]
    depth = away[:, None] * normal[..., 2] / np.sum(normal * rays, axis=-1)
    at = np.stack([depth * np.sum(along * rays, axis=-1), depth * rays[..., 1]], axis=-1)
    return _Hits(depth, np.broadcast_to(normal, rays.shape), at)


def _places(rng: np.random.Generator, half: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres `(N, 3)` of things so high (half of it), on the floor or floating over it; and whether they are there."""
    number = len(height)
    lift = np.maximum(rng.uniform(-1, 0.6, number), 0)
    centre = np.stack([rng.uniform(-1.2, 1.2, number), height - half - lift, rng.uniform(2, 3.6, number)], axis=1)
    return centre, rng.random((number, 1)) < 0.8


def _ball(rng: np.random.Generator, rays: np.ndarray, height: np.ndarray) -> _Hits:
    radius = rng.uniform(0.4, 0.8, len(rays))
    centre, there = _places(rng, radius, height)
    a, b = np.sum(rays**2, axis=-1), np.einsum("npk,nk->np", rays, centre)
    inside = b**2 - a * (np.sum(centre**2, axis=1) - radius**2)[:, None]
    depth = np.where((inside > 0) & there, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    finite = np.where(np.isfinite(depth), depth, 0)[..., None]
    normals = (finite * rays - centre[:, None]) / radius[:, None, None]
    around = np.arctan2(normals[..., 0], -normals[..., 2])
    up = np.arcsin(np.clip(normals[..., 1], -1, 1))
    return _Hits(depth, normals, radius[:, None, None] * np.stack([around, up], axis=-1))


def _box(rng: np.random.Generator, rays: np.ndarray, height: np.ndarray) -> _Hits:
    """A cuboid, turned and tilted. Seen in its own axes, where its sides are three pairs of planes."""
    half = rng.uniform(0.3, 0.65, (len(rays), 3))
    centre, there = _places(rng, half[:, 1], height)
    turn, tilt = rng.uniform(0, np.pi, len(rays)), rng.uniform(-0.4, 0.4, len(rays))
    zero, one = np.zeros(len(rays)), np.ones(len(rays))
    turned = np.array(
        [[np.cos(turn), zero, np.sin(turn)], [zero, one, zero], [-np.sin(turn), zero, np.cos(turn)]]
    ).transpose(2, 0, 1)
    tilted = np.array(
        [[one, zero, zero], [zero, np.cos(tilt), -np.sin(tilt)], [zero, np.sin(tilt), np.cos(tilt)]]
    ).transpose(2, 0, 1)
    axes = turned @ tilted  # (N, 3, 3), a column each
    ways, origin = rays @ axes, -np.einsum("nk,nkj->nj", centre, axes)[:, None]
    enter, leave = np.sort([(sign * half[:, None] - origin) / ways for sign in (-1, 1)], axis=0)
    depth = np.max(enter, axis=-1)
    hit = (depth > 0) & (depth < np.min(leave, axis=-1)) & there
    side = np.argmax(enter, axis=-1)[..., None]  # through which it enters
    outward = np.where(np.arange(3) == side, -np.sign(ways), 0)
    place = origin + np.where(hit, depth, 0)[..., None] * ways
    at = np.take_along_axis(place, np.concatenate([(side + 1) % 3, (side + 2) % 3], axis=-1), axis=-1)
    return _Hits(np.where(hit, depth, np.inf), outward @ axes.transpose(0, 2, 1), at)


# -- Real ----------------------------------------------------------------------


def motorcycle(seed: int, train_size: int, test_size: int) -> Split:
    """Crops of the real photograph: to train, random ones of its left part; to test, the same ones of its right part.

    Its classes are three layers of depth (`LAYERS`), with as many pixels each: nobody has labelled what is in it.
    Normals are those of the plane that fits the disparity around a pixel. Where none was measured, or it jumps, nothing
    is known.

    Args:
      seed: decides the training crops.
      train_size: number of training crops.
      test_size: number of test crops at most; as many as fit evenly.

    Returns:
      A `Split`, with `LAYERS` for classes.
    """
    whole = _motorcycle()
    rng = np.random.default_rng([seed, 4])
    rows = whole.images.shape[1] - SIDE + 1
    columns = _TRAIN_COLUMNS.stop - SIDE + 1
    train = np.stack([rng.integers(rows, size=train_size), rng.integers(columns, size=train_size)], axis=1)
    down = np.linspace(0, rows - 1, max(test_size // 3, 1)).astype(int)
    right = np.linspace(_TEST_COLUMNS.start, _TEST_COLUMNS.stop - SIDE, min(test_size, 3)).astype(int)
    test = np.stack(np.meshgrid(down, right, indexing="ij"), axis=-1).reshape(-1, 2)
    return Split(_crops(whole, train), _crops(whole, test))


def _crops(whole: Scenes, corners: np.ndarray) -> Scenes:
    return Scenes(*(np.stack([field[0, r : r + SIDE, c : c + SIDE] for r, c in corners]) for field in whole))


@functools.cache
def _motorcycle() -> Scenes:
    """The whole picture at a quarter of its size, as the only one."""
    image = _read("skimage.data", "motorcycle_left.png")
    with resources.as_file(resources.files("skimage.data") / "motorcycle_disp.npz") as path, np.load(path) as file:
        disparity = file[file.files[0]].astype(float)
    measured = np.isfinite(disparity) & (disparity > 0)
    nearest = ndimage.distance_transform_edt(~measured, return_distances=False, return_indices=True)
    disparity = disparity[tuple(nearest)]
    normals, slope = normals_of(disparity + _OFFSET)
    known = measured & (slope < 0.5)  # a floor at one metre under the camera has 0.2

    height, width = (size // _STRIDE for size in disparity.shape)
    blocks = image[: height * _STRIDE, : width * _STRIDE].reshape(height, _STRIDE, width, _STRIDE, 3)
    at = (slice(_STRIDE // 2, height * _STRIDE, _STRIDE), slice(_STRIDE // 2, width * _STRIDE, _STRIDE))
    depth = (_BASELINE * _FOCAL / (disparity + _OFFSET))[at]
    layers = np.digitize(depth, np.quantile(depth[known[at]], [1 / 3, 2 / 3]))
    return Scenes(
        images=(blocks.mean(axis=(1, 3)) / 255).astype(np.float32)[None],
        classes=np.where(known[at], layers, UNKNOWN).astype(np.int32)[None],
        depth=depth.astype(np.float32)[None],
        normals=normals[at].astype(np.float32)[None],
    )


def normals_of(disparity: np.ndarray, width: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Normals `(H, W, 3)` from disparities `(H, W)` that are zero at infinity, and how steeply these change.

    One over depth is linear in the coordinates of the picture where a surface is plane, and so is disparity `D`: the
    normal goes as `(D_x, D_y, D - x D_x - y D_y)`, with x and y in focal lengths from the centre.

    Args:
      disparity: in pixels.
      width: standard deviation of the Gaussian that derivatives are taken with, in pixels.

    Returns:
      The normals, and the length of the gradient `(H, W)`, in pixels a pixel.
    """
    value, down, right = (ndimage.gaussian_filter(disparity, width, order) for order in ((0, 0), (1, 0), (0, 1)))
    rows, columns = np.indices(disparity.shape)
    x, y = (columns - _CENTRE[0]) / _FOCAL, (rows - _CENTRE[1]) / _FOCAL
    towards = -np.stack([_FOCAL * right, _FOCAL * down, value - _FOCAL * (x * right + y * down)], axis=-1)
    return towards / np.linalg.norm(towards, axis=-1, keepdims=True), np.hypot(down, right)
