"""Numbers on edited pictures: torchmetrics classes that take `update(edited, source)`.

Both are [3, H, W] in [0, 1], as read back from the 8-bit files; `compute` is the mean over updates.
"""

from csd_exp.metrics.answers import AnswerDisagreement as AnswerDisagreement
from csd_exp.metrics.answers import AnswerDistance as AnswerDistance
from csd_exp.metrics.answers import Answers as Answers
from csd_exp.metrics.answers import EditStrength as EditStrength
from csd_exp.metrics.base import PictureMetric as PictureMetric
from csd_exp.metrics.perceptual import LPIPS as LPIPS
from csd_exp.metrics.perceptual import EfficientNetDistance as EfficientNetDistance
from csd_exp.metrics.perceptual import efficientnet_distance as efficientnet_distance
from csd_exp.metrics.perceptual import style_embedding as style_embedding
from csd_exp.metrics.similarity import SSIM as SSIM
from csd_exp.metrics.similarity import StructureSimilarity as StructureSimilarity
from csd_exp.metrics.windows import WindowSpread as WindowSpread
from csd_exp.metrics.windows import corners as corners
from csd_exp.metrics.windows import mean_colour as mean_colour
from csd_exp.metrics.windows import pixels as pixels
from csd_exp.metrics.windows import style_statistics as style_statistics
from csd_exp.metrics.windows import windows as windows
