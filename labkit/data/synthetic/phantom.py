"""A chest drawn from formulas, another one for each patient: body, fat, lungs, heart, spine, ribs, aorta, airway, vessels.

Every part is an ellipsoid or a tube in coordinates that are themselves bent by a smooth random field, so that no two
patients have the same outlines. HU are those of textbooks: air -1000, lung -870 and denser towards the back, fat -100,
soft tissue 40, bone 300 and more.

Used by `labkit.data.synthetic.volumes`.
"""

import numpy as np

from labkit.data.synthetic.fields import Patient, axes, blur, smooth, tubes

WINDOW = (-1000.0, 400.0)  # HU


def chest(rng: np.random.Generator, shape: tuple[int, int, int]) -> Patient:
    """A chest without lesions: slices from foot to head, rows from front to back, lungs as the organ."""

    def near(value: float, spread: float = 0.1) -> float:
        return value * (1 + spread * rng.uniform(-1, 1))

    voxel = 2.0 / max(shape)
    z, y, x = (line + 0.05 * smooth(rng, shape, 3) for line in axes(shape))
    x = x - 0.05 * rng.uniform(-1, 1)

    def ellipse(cx: float, cy: float, rx: float, ry: float, edge: float = 1.0) -> np.ndarray:
        """1 inside, 0 outside, one voxel between them."""
        distance = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
        return np.clip((1 - distance) * min(rx, ry) / (edge * voxel) + 0.5, 0, 1)

    wide, deep, fat = near(0.92, 0.06), near(0.74, 0.08), near(0.07, 0.5)
    body, muscle = ellipse(0, 0, wide, deep), ellipse(0, 0, wide - fat, deep - fat)
    hu = -1000 + 900 * body
    hu += (near(45) + 100) * muscle

    apex = np.sqrt(np.clip(1 - ((z + 0.9) / near(1.85, 0.04)) ** 2, 0.0025, 1))  # lungs narrow towards the head
    lungs = np.zeros(shape, dtype=np.float32)
    for side in (-1, 1):
        cx, rx, ry = side * near(0.4) * wide, near(0.33) * wide, near(0.72, 0.06) * deep
        distance = np.sqrt(((x - cx) / (rx * apex)) ** 2 + (y / (ry * apex)) ** 2)
        dome = near(-0.65, 0.15) - 0.5 * ((x - cx) ** 2 / rx**2 + y**2 / ry**2) * near(0.5)
        lungs += np.clip((1 - distance) * rx * apex / voxel + 0.5, 0, 1) * np.clip((z - dome) / voxel, 0, 1)
    heart = ellipse(-near(0.14) * wide, -near(0.15) * deep, near(0.34) * wide, near(0.4) * deep)
    heart *= np.clip((1 - np.abs(z - near(-0.25, 0.3)) / near(0.45)) / 0.2, 0, 1)
    lungs = np.clip(lungs - heart, 0, 1) * muscle

    air = near(-870, 0.05) + near(90, 0.8) * (y / deep) + near(20, 0.8) * smooth(rng, shape, 4)
    hu += lungs * (air - hu)
    spine_y = near(0.72, 0.04) * deep
    for cx, cy, radius, value in (
        (0, spine_y, near(0.13), near(320, 0.3)),
        (0, spine_y + 0.13, near(0.05), near(450, 0.3)),
        (near(-0.15) * wide, near(0.42) * deep, near(0.07), near(130, 0.4)),  # aorta, with or without contrast agent
    ):
        part = ellipse(cx, cy, radius, radius)
        hu += part * (value - hu)
        lungs *= 1 - part
    airway = ellipse(0, near(0.05, 1.0), near(0.05), near(0.05)) * np.clip((z - 0.1) / voxel, 0, 1)
    hu += airway * (-980 - hu)
    lungs *= 1 - airway

    rib = np.abs(np.sqrt((x / (wide - fat - 0.04)) ** 2 + (y / (deep - fat - 0.04)) ** 2) - 1)
    ribs = np.clip((0.045 - rib) / 0.03, 0, 1) * np.clip(6 * (np.sin(near(14) * (z + near(0.5) * y)) - 0.55), 0, 1) * body
    hu += ribs * (near(420, 0.3) - hu)

    vessels = tubes(rng, lungs, count=int(rng.integers(10, 40)))
    hu += vessels * rng.uniform(0.4, 0.9) * lungs * (40 - hu)
    return Patient(hu.astype(np.float32), blur(lungs.astype(np.float32), 0.4), WINDOW)
