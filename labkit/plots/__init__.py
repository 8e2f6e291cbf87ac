from labkit.plots.runs import *
from labkit.plots.runs import __all__, crossing
