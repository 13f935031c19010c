"""Numbers on edited pictures: torchmetrics classes that take `update(edited, source)`, frames in order.

Both are [3, H, W] in [0, 1], as read back from the 8-bit files; `compute` is the mean over pictures, or over
pairs of consecutive frames. `csd_exp.facts` says what else an `update` may ask for.
"""

from csd_exp.metrics.answers import AnswerDisagreement as AnswerDisagreement
from csd_exp.metrics.answers import AnswerDistance as AnswerDistance
from csd_exp.metrics.answers import Answers as Answers
from csd_exp.metrics.answers import EditStrength as EditStrength
from csd_exp.metrics.base import FrameMetric as FrameMetric
from csd_exp.metrics.base import MeanMetric as MeanMetric
from csd_exp.metrics.base import PictureMetric as PictureMetric
from csd_exp.metrics.clip import CLIPDirectionalSimilarity as CLIPDirectionalSimilarity
from csd_exp.metrics.clip import CLIPDirectionConsistency as CLIPDirectionConsistency
from csd_exp.metrics.clip import CLIPDirectionConsistencyAsPrinted as CLIPDirectionConsistencyAsPrinted
from csd_exp.metrics.clip import CLIPEditConsistency as CLIPEditConsistency
from csd_exp.metrics.clip import CLIPGeometry as CLIPGeometry
from csd_exp.metrics.clip import CLIPImageConsistency as CLIPImageConsistency
from csd_exp.metrics.clip import CLIPImageSimilarity as CLIPImageSimilarity
from csd_exp.metrics.clip import CLIPJanus as CLIPJanus
from csd_exp.metrics.clip import CLIPTextSimilarity as CLIPTextSimilarity
from csd_exp.metrics.clip import CLIPTextureless as CLIPTextureless
from csd_exp.metrics.flow import DIS as DIS
from csd_exp.metrics.flow import RAFT as RAFT
from csd_exp.metrics.flow import Drift as Drift
from csd_exp.metrics.flow import ExactWarpingError as ExactWarpingError
from csd_exp.metrics.flow import WarpingError as WarpingError
from csd_exp.metrics.masked import PSNROutside as PSNROutside
from csd_exp.metrics.masked import SSIMOutside as SSIMOutside
from csd_exp.metrics.perceptual import LPIPS as LPIPS
from csd_exp.metrics.perceptual import Diversity as Diversity
from csd_exp.metrics.perceptual import EfficientNetDistance as EfficientNetDistance
from csd_exp.metrics.perceptual import PerceptualConsistency as PerceptualConsistency
from csd_exp.metrics.perceptual import ReconstructionDistance as ReconstructionDistance
from csd_exp.metrics.perceptual import efficientnet_distance as efficientnet_distance
from csd_exp.metrics.perceptual import style_embedding as style_embedding
from csd_exp.metrics.similarity import SSIM as SSIM
from csd_exp.metrics.similarity import ReconstructionPSNR as ReconstructionPSNR
from csd_exp.metrics.similarity import ReconstructionSSIM as ReconstructionSSIM
from csd_exp.metrics.similarity import StructureSimilarity as StructureSimilarity
from csd_exp.metrics.windows import ColourSeams as ColourSeams
from csd_exp.metrics.windows import SeamEnergy as SeamEnergy
from csd_exp.metrics.windows import StyleSpread as StyleSpread
from csd_exp.metrics.windows import WindowSpread as WindowSpread
from csd_exp.metrics.windows import colour_statistics as colour_statistics
from csd_exp.metrics.windows import corners as corners
from csd_exp.metrics.windows import mean_colour as mean_colour
from csd_exp.metrics.windows import pixels as pixels
from csd_exp.metrics.windows import style_statistics as style_statistics
from csd_exp.metrics.windows import windows as windows
