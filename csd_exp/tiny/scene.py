"""`csd-make-scene`: renders the posed photographs of csd_exp/assets/scenes, with exact cameras and depth.

Its meshes and its light come from the npm package @pmndrs/assets and its textures from photographs, all CC0;
every surface has the colours of a photograph, projected along the three axes. The world is in metres and z
points up; cameras are camera-to-world matrices in OpenGL axes (x right, y up, looking along -z).
"""

import argparse
import base64
import io
import json
import sys
from dataclasses import dataclass
from math import radians, tan
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from csd_exp.errors import InputError
from csd_exp.files import write_whole

FOV = 50.0  # degrees, both ways
DEPTH_UNIT = 1e-4  # metres; 16 bits reach 6.5 m
GAMMA = 2.2  # of photographs, in and out
BRIGHTEST = 2.0  # radiance; what is brighter in the sky is its sun, lit apart


def look_at(eyes: ndarray, targets: ndarray) -> ndarray:
    """Cameras [n, 4, 4] at `eyes` [n, 3] that see `targets` [n, 3] in the middle and z upright."""
    back = _unit(eyes - targets)
    right = _unit(np.cross([0.0, 0.0, 1.0], back))
    cameras = np.tile(np.eye(4), (len(eyes), 1, 1))
    cameras[:, :3] = np.stack([right, np.cross(back, right), back, eyes], -1)
    return cameras


def around(azimuths: ndarray, elevations: ndarray, distances: ndarray, target: ndarray) -> ndarray:
    """Points [n, 3] about `target` [3] or [n, 3], at distances [n].

    Azimuths [n], from x to y, and elevations [n], from there to z, are in degrees.
    """
    azimuth, elevation = np.radians(azimuths), np.radians(elevations)
    level = np.cos(elevation)
    return target + distances[..., None] * np.stack(
        [level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)], -1
    )


def spread(n: int, *ranges: tuple[float, float]) -> tuple[ndarray, ...]:
    """`n` azimuths in degrees and for each of `ranges` n values in it: few points that fill it all evenly."""
    k = np.arange(n)
    # powers of the root of x^(d+1) = x + 1: the evenest steps known in d dimensions (Roberts 2018)
    d = len(ranges) + 1
    root = 2.0
    for _ in range(50):
        root = (1 + root) ** (1 / (d + 1))
    turns = [(0.5 + k * root ** -(i + 1)) % 1 for i in range(d)]
    return 360 * turns[0], *(low + (high - low) * u for (low, high), u in zip(ranges, turns[1:], strict=True))


def triplanar(points: ndarray, normals: ndarray, picture: ndarray, side: float) -> ndarray:
    """Colours [n, 3] of `picture` [h, w, 3] projected along each axis on a surface, mixed by its normals.

    points: [n, 3] in metres; normals: [n, 3]. A picture is `side` metres high, its neighbours mirror images.
    """
    weights = np.abs(normals) ** 4
    weights /= weights.sum(1, keepdims=True)
    x, y, z = (points * len(picture) / side).T
    planes = [(y, -z), (x, -z), (x, y)]
    return sum(weights[:, i, None] * _mirrored(picture, *plane) for i, plane in enumerate(planes))


def _mirrored(picture: ndarray, column: ndarray, row: ndarray) -> ndarray:
    """Bilinear samples [n, 3] of the picture's endless mirror tiling; its first pixel covers 0 to 1."""
    height, width = picture.shape[:2]

    def axis(at: ndarray, size: int) -> tuple[ndarray, ndarray, ndarray]:
        at = at - 0.5
        low = np.floor(at).astype(int)
        folded = [
            np.where(k % (2 * size) < size, k % (2 * size), -1 - k % (2 * size)) for k in (low, low + 1)
        ]
        return folded[0] % size, folded[1] % size, (at - low)[:, None]

    left, right, u = axis(column, width)
    top, bottom, v = axis(row, height)
    upper = (1 - u) * picture[top, left] + u * picture[top, right]
    lower = (1 - u) * picture[bottom, left] + u * picture[bottom, right]
    return (1 - v) * upper + v * lower


def _unit(vectors: ndarray) -> ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Photograph:
    """The `box` (left, top, right, bottom) of a file, in pixels; brightened by `gain`, in linear light."""

    file: str
    box: tuple[int, int, int, int] | None = None
    gain: float = 1.0

    def read(self, folder: Path) -> ndarray:
        """Linear colours [h, w, 3] in [0, 1]."""
        if not (folder / self.file).is_file():
            raise InputError(f"--photos {folder} has no {self.file}; give the folder of the CC0 photographs.")
        with Image.open(folder / self.file) as opened:
            pixels = np.asarray(opened.convert("RGB").crop(self.box), float)
        return np.clip(self.gain * (pixels / 255) ** GAMMA, 0, 1)


@dataclass(frozen=True)
class Surface:
    """A mesh in the colours of a photograph that is `side` metres high and begins at `corner`."""

    mesh: Any
    photograph: Photograph
    side: float
    corner: tuple[float, float, float] = (0.0, 0.0, 0.0)
    smooth: bool = False


@dataclass(frozen=True)
class Scene:
    """What is seen, its lights as Mitsuba's dictionaries, and cameras [n, 4, 4].

    Light is followed over `max_depth` segments; what comes after is `ambient`, the same everywhere.
    """

    surfaces: dict[str, Surface]
    lights: dict[str, Any]
    train: ndarray
    test: ndarray
    max_depth: int = 3
    ambient: float = 0.0


WOOD = Photograph("categorization_bucket.jpg", (45, 170, 190, 280))
FEATHERS = Photograph("explore_world_animals_scarlet_macaw.jpg", (331, 210, 452, 323), gain=1.5)
CLOTH = Photograph("categorization_scissors3.jpg", (20, 10, 150, 75))
PLASTER = Photograph("categorization_screwDriver2.jpg", (140, 180, 235, 310), gain=1.2)
PLUMAGE = Photograph("explore_world_animals_scarlet_macaw.jpg", (225, 120, 330, 200))


def tabletop(assets: Path) -> Scene:
    """A painted bunny, 1 m high, on a round wooden table in a park; the test views are a turntable of 36."""
    import mitsuba as mi
    import trimesh

    bunny = _stood(_model(assets, "bunny"), height=1.0)
    table = trimesh.creation.cylinder(1.05, 0.12, sections=128)
    table.apply_translation([0, 0, -0.06])
    surfaces = {
        "bunny": Surface(bunny, FEATHERS, 0.7, smooth=True),
        "table": Surface(_fine(table), WOOD, 0.9),
    }
    sun = around(np.array([230.0]), np.array([50.0]), np.array([1.0]), np.zeros(3))[0]
    lights = {
        "sky": {"type": "envmap", "bitmap": mi.Bitmap(_sky(assets, "park")), "scale": 2.2}
        | {"to_world": mi.ScalarTransform4f().rotate([1, 0, 0], 90)},
        "sun": {"type": "directional", "direction": (-sun).tolist()}
        | {"irradiance": {"type": "rgb", "value": [4.0, 3.6, 3.0]}},
    }
    middle = np.array([0.0, 0.0, 0.4])
    azimuths, elevations, distances = spread(64, (8.0, 55.0), (2.3, 3.0))
    eyes = around(azimuths, elevations, distances, middle)
    turn = around(np.arange(36) * 10.0, np.full(36, 16.0), np.full(36, 2.6), middle)
    return Scene(surfaces, lights, look_at(eyes, middle + 0 * eyes), look_at(turn, middle + 0 * turn))


def room(assets: Path) -> Scene:
    """A room of 4.4 x 3.4 x 2.5 m seen from inside, lit from its ceiling; its 24 test views turn around."""
    import mitsuba as mi
    import trimesh

    def block(
        x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], edge: float = 0.03
    ) -> Any:
        return _fine(trimesh.creation.box(bounds=np.array([x, y, z]).T), edge)

    def painting(middle: tuple[float, float], photograph: Photograph) -> Surface:
        """1.5 x 1 m, hung on the wall that `middle` touches."""
        x, y = middle
        half = (0.02, 0.75) if abs(x) > 2 else (0.75, 0.02)
        canvas = block((x - half[0], x + half[0]), (y - half[1], y + half[1]), (0.95, 1.95))
        return Surface(canvas, photograph, 1.0, corner=(x - half[0], y - half[1], 1.95))

    legs = [block((x, x + 0.07), (y, y + 0.07), (0, 0.68)) for x in (1.15, 1.93) for y in (-1.6, -0.57)]
    table = [block((1.1, 2.05), (-1.65, -0.45), (0.68, 0.74)), *legs]
    sofa = [((-1.1, 0.7), (0.9, 1.65), (0, 0.4)), ((-1.1, 0.7), (1.4, 1.65), (0.4, 0.85))]
    sofa += [((x, x + 0.2), (0.9, 1.65), (0, 0.6)) for x in (-1.3, 0.7)]
    monkey = _stood(_model(assets, "suzi"), height=0.5, turn=-55)
    monkey.apply_translation([1.55, -1.05, 0.74])
    bunny = _stood(_model(assets, "bunny"), height=0.7, turn=60)
    bunny.apply_translation([-1.6, -1.1, 0.4])
    walls = [block((x, x + 0.1), (-1.7, 1.7), (0, 2.5), 0.1) for x in (-2.3, 2.2)]
    walls += [block((-2.2, 2.2), (y, y + 0.1), (0, 2.5), 0.1) for y in (-1.8, 1.7)]
    surfaces = {
        "floor": Surface(block((-2.2, 2.2), (-1.7, 1.7), (-0.1, 0)), WOOD, 1.2),
        "ceiling": Surface(block((-2.2, 2.2), (-1.7, 1.7), (2.5, 2.6), 0.1), PLASTER, 2.5),
        "walls": Surface(trimesh.util.concatenate(walls), PLASTER, 2.5),
        "rug": Surface(block((-1.0, 1.0), (-0.8, 0.7), (0, 0.02)), PLUMAGE, 0.75),
        "sofa": Surface(trimesh.util.concatenate([block(*part) for part in sofa]), CLOTH, 0.5),
        "table": Surface(trimesh.util.concatenate(table), WOOD, 0.9),
        "stool": Surface(block((-1.95, -1.25), (-1.45, -0.75), (0, 0.4)), WOOD, 0.6),
        "monkey": Surface(monkey, PLUMAGE, 0.4, smooth=True),
        "bunny": Surface(bunny, FEATHERS, 0.5, smooth=True),
        "castle": painting((2.18, 0.6), Photograph("explore_monuments_neuschwansteinCastle.jpg")),
        "mountain": painting(
            (-2.18, 0.0), Photograph("explore_monuments_machuPicchu.jpg", (40, 0, 472, 288))
        ),
        "panda": painting((0.0, -1.68), Photograph("erase_red_panda.jpg", (80, 0, 512, 288))),
        "lemurs": painting((-0.2, 1.68), Photograph("explore_world_animals_lemur.jpg")),
    }
    lamp = mi.ScalarTransform4f().translate([0, 0, 2.49]).rotate([1, 0, 0], 180).scale([1.2, 0.8, 1])
    light = {"type": "area", "radiance": {"type": "rgb", "value": [9.0, 8.5, 7.8]}}
    azimuths, turns, pitches, heights, radii = spread(48, (-25, 25), (-25, 5), (1.0, 1.6), (0.2, 1.0))
    eyes = around(azimuths + 180, 0 * azimuths, radii, np.zeros(3)) + np.outer(heights, [0, 0, 1])
    train = look_at(eyes, around(azimuths + turns, pitches, np.ones(48), eyes))
    turn = np.arange(24) * 15.0
    eyes = around(turn + 180, 0 * turn, np.full(24, 0.5), np.array([0, 0, 1.3]))
    test = look_at(eyes, around(turn, np.full(24, -10.0), np.ones(24), eyes))
    lights = {"lamp": {"type": "rectangle", "to_world": lamp, "emitter": light}}
    return Scene(surfaces, lights, train, test, max_depth=2, ambient=0.4)


SCENES = {"object": tabletop, "room": room}


def write_scene(scene: Scene, photos: Path, folder: Path, size: int, samples: int) -> None:
    """Render `scene` at `size` px squared into `folder`: images/, depth/ and transforms.json.

    Depth is the distance along the optical axis at the middle of a pixel, in DEPTH_UNIT; 0 is sky.
    """
    import mitsuba as mi

    shapes = {name: _shape(name, surface, photos) for name, surface in scene.surfaces.items()}
    # each light apart, since choosing one of them at random would be most of the noise
    worlds = [mi.load_dict({"type": "scene", **shapes, name: light}) for name, light in scene.lights.items()]
    path = {"type": "path", "max_depth": scene.max_depth}
    integrator = mi.load_dict({"type": "aov", "aovs": "albedo:albedo", "path": path})
    focal = size / 2 / tan(radians(FOV / 2))
    splits = {"train": scene.train, "test": scene.test}
    frames: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    for split, cameras in splits.items():
        for k, camera in enumerate(cameras):
            image, depth = f"images/{split}_{k:03}.jpg", f"depth/{split}_{k:03}.png"
            sensor, seed = _sensor(camera, size, samples), len(frames["train"]) + k
            passes = [
                np.array(mi.render(world, sensor=sensor, integrator=integrator, seed=seed))
                for world in worlds
            ]
            radiance = sum(found[..., :3] for found in passes) + scene.ambient * passes[0][..., 3:6]
            write_whole(folder / image, _file(_encoded(radiance), format="JPEG", quality=95, subsampling=0))
            units = np.round(depth_of(worlds[0], camera, focal, size) / DEPTH_UNIT).astype(np.uint16)
            write_whole(folder / depth, _file(Image.fromarray(units), format="PNG", optimize=True))
            pose = camera.round(9).tolist()
            frames[split].append({"file_path": image, "depth_file_path": depth, "transform_matrix": pose})
            print(f"{folder / image}", flush=True)
    intrinsics = {"camera_model": "PINHOLE", "w": size, "h": size, "fl_x": focal, "fl_y": focal}
    intrinsics |= {"cx": size / 2, "cy": size / 2, "depth_unit_scale_factor": DEPTH_UNIT}
    names = {f"{split}_filenames": [frame["file_path"] for frame in found] for split, found in frames.items()}
    write_whole(folder / "transforms.json", _tidy(intrinsics | names, frames["train"] + frames["test"]))


def depth_of(world: Any, camera: ndarray, focal: float, size: int) -> ndarray:
    """Metres [size, size] along the optical axis to what the middle of each pixel shows; 0 for the sky."""
    import mitsuba as mi

    at = (np.arange(size) + 0.5 - size / 2) / focal
    x, y = np.meshgrid(at, -at)
    # not of length one: the distance along a ray is then that along the axis
    rays = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3) @ camera[:3, :3].T
    eye = camera[:3, 3].tolist()
    found = [world.ray_intersect(mi.Ray3f(eye, ray)) for ray in rays.tolist()]
    return np.array([hit.t if hit.is_valid() else 0.0 for hit in found]).reshape(size, size)


def _model(assets: Path, name: str) -> Any:
    """A mesh of @pmndrs/assets, twice subdivided."""
    import trimesh

    mesh: Any = trimesh.load(io.BytesIO(_asset(assets, f"models/{name}.glb")), file_type="glb", force="mesh")
    mesh.merge_vertices(merge_norm=True, merge_tex=True)
    return trimesh.Trimesh(*trimesh.remesh.subdivide_loop(mesh.vertices, mesh.faces, iterations=2))


def _stood(mesh: Any, height: float, turn: float = 0.0) -> Any:
    """The mesh, whose y points up, scaled to `height`, standing on the origin, turned by degrees about z."""
    upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], float)
    c, s = np.cos(radians(turn)), np.sin(radians(turn))
    mesh.vertices = mesh.vertices @ (np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ upright).T
    low, high = mesh.bounds
    mesh.vertices = (mesh.vertices - [*(low + high)[:2] / 2, low[2]]) * height / (high - low)[2]
    return mesh


def _fine(mesh: Any, edge: float = 0.02) -> Any:
    """The mesh with no edge longer than `edge` metres: colours are those of its vertices."""
    import trimesh

    return trimesh.Trimesh(*trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, edge, max_iter=20))


def _sky(assets: Path, name: str) -> ndarray:
    """Radiance [h, w, 3] all around, without the sun, which its file holds cut off."""
    import mitsuba as mi

    stream = mi.MemoryStream()
    stream.write(_asset(assets, f"hdri/{name}.exr"))
    stream.seek(0)
    bitmap = mi.Bitmap(stream).convert(mi.Bitmap.PixelFormat.RGB, mi.Struct.Type.Float32, False)
    radiance = np.array(bitmap).clip(0)
    radiance[radiance.max(-1) > BRIGHTEST] = BRIGHTEST
    return radiance


def _asset(assets: Path, name: str) -> bytes:
    """A file of @pmndrs/assets: a JavaScript module that exports it as a base64 URL."""
    module = assets / f"{name}.js"
    if not module.is_file():
        raise InputError(f"--assets {assets} has no {name}.js; give npm's @pmndrs/assets, unpacked.")
    return base64.b64decode(module.read_text().split(";base64,", 1)[1].split("'", 1)[0])


def _shape(name: str, surface: Surface, photos: Path) -> Any:
    import mitsuba as mi

    points, normals = np.asarray(surface.mesh.vertices), np.asarray(surface.mesh.vertex_normals)
    colours = triplanar(points - surface.corner, normals, surface.photograph.read(photos), surface.side)
    base = {"type": "mesh_attribute", "name": "vertex_color"}
    material = mi.Properties()
    gloss = {"roughness": 0.5, "specular": 0.3}
    material["bsdf"] = mi.load_dict({"type": "principled", "base_color": base, **gloss})
    faces = surface.mesh.faces
    shape = mi.Mesh(name, len(points), len(faces), has_vertex_normals=surface.smooth, props=material)
    shape.add_attribute("vertex_color", 3, colours.ravel().astype(np.float32))
    arrays = mi.traverse(shape)
    arrays["vertex_positions"] = points.ravel().astype(np.float32)
    arrays["faces"] = faces.ravel().astype(np.uint32)
    if surface.smooth:
        arrays["vertex_normals"] = normals.ravel().astype(np.float32)
    arrays.update()
    return shape


def _sensor(camera: ndarray, size: int, samples: int) -> Any:
    import mitsuba as mi

    film = {"type": "hdrfilm", "pixel_format": "rgb", "rfilter": {"type": "box"}}
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": FOV,
            "near_clip": 0.01,
            "to_world": mi.ScalarTransform4f(camera @ np.diag([-1.0, 1, -1, 1])),  # x left, looking along z
            "film": film | {"width": size, "height": size},
            "sampler": {"type": "multijitter", "sample_count": samples},
        }
    )


def _encoded(radiance: ndarray) -> Image.Image:
    """The picture of linear light [h, w, 3], cut off above 1."""
    return Image.fromarray(np.round(255 * radiance.clip(0, 1) ** (1 / GAMMA)).astype(np.uint8))


def _file(image: Image.Image, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def _tidy(head: dict[str, Any], frames: list[dict[str, Any]]) -> str:
    """A transforms.json with one line for each key and each frame."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(f"    {json.dumps(frame)}" for frame in frames)
    return "{\n" + ",\n".join([*lines, f'  "frames": [\n{rows}\n  ]']) + "\n}\n"


def main(argv: list[str] | None = None) -> None:
    """Console entry `csd-make-scene`."""
    parser = argparse.ArgumentParser(
        "csd-make-scene", description="Renders a shipped scene; needs the extra render."
    )
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("--assets", type=Path, required=True, help="npm's @pmndrs/assets, unpacked")
    parser.add_argument("--photos", type=Path, required=True, help="the folder of the CC0 photographs")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side of a view")
    parser.add_argument("--samples", type=int, default=64, help="light paths for each pixel and light")
    options = parser.parse_args(argv)
    try:
        import mitsuba as mi

        mi.set_variant("scalar_rgb")
        write_scene(
            SCENES[options.scene](options.assets), options.photos, options.to, options.size, options.samples
        )
    except InputError as error:
        sys.exit(_refused(str(error)))
    except ImportError as error:
        sys.exit(_refused(f"{error.name} is not installed; pip install 'csd_exp[render]' brings it."))


def _refused(sentence: str) -> int:
    print(f"csd-make-scene: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
