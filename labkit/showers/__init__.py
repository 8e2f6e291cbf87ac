"""Showers in a calorimeter: their data, networks that make them (a GAN, a flow), and whether these measure like the simulated ones."""

from labkit.names import face
from labkit.showers import geant4, parametrised
from labkit.showers.features import observables
from labkit.showers.figures import fractions, page
from labkit.showers.files import open_showers
from labkit.showers.flow import ShowerFlow
from labkit.showers.gan import ShowerGAN
from labkit.showers.generation import generate
from labkit.showers.validation import negative_objective, objective, official, validate

__all__ = [
    "ShowerFlow",
    "ShowerGAN",
    "fractions",
    "geant4",
    "generate",
    "negative_objective",
    "objective",
    "observables",
    "official",
]
__all__ += ["open_showers", "page", "parametrised", "validate"]
__getattr__, __dir__ = face(__name__)
