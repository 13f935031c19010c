"""What is optimised: a set of images, or a panorama as overlapping windows."""

from csd_exp.particles.base import Particles as Particles
from csd_exp.particles.images import Images as Images
from csd_exp.particles.panorama import Panorama as Panorama
