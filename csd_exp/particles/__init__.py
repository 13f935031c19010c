"""What is optimised: images, a panorama as windows, a video, its clips, a scene, or pictures from noise."""

from csd_exp.particles.base import Particles as Particles
from csd_exp.particles.canvas import Canvas as Canvas
from csd_exp.particles.clips import Clips as Clips
from csd_exp.particles.generated import Generated as Generated
from csd_exp.particles.images import Images as Images
from csd_exp.particles.panorama import Panorama as Panorama
from csd_exp.particles.scene import EditedField as EditedField
from csd_exp.particles.scene import EditedPhotographs as EditedPhotographs
from csd_exp.particles.text_to_3d import GeneratedScene as GeneratedScene
from csd_exp.particles.video import Video as Video
