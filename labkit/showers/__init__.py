"""Showers in a calorimeter: those of Geant4 that come with the package, parametrised ones, and files of others."""

from labkit.showers import geant4, parametrised
from labkit.showers.features import observables
from labkit.showers.files import open_showers

__all__ = ["geant4", "observables", "open_showers", "parametrised"]
