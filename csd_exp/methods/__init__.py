"""Residuals: what one view, by itself, would descend. Pure functions on tensors, or modules that learn.

A method is one of these and a kernel (conf/method names the pairs): sds = (sds, none), csd = (sds, rbf),
dds = (dds, none), csd_edit = (dds, rbf), and one more by the residual's own name for each other. Under an
editing prior, dds is CSD-Edit without SVGD and (sds, rbf) is CSD-Edit with random noise as its baseline.
Residuals are in noise units, a negated score times sigma_t; pds alone has a scale of its own. `pure` are
differences of estimates at one level, `inversion` goes along the prior's own process, `vsd` learns.
"""

from csd_exp.methods.base import Residual as Residual
from csd_exp.methods.base import Score as Score
from csd_exp.methods.base import Views as Views
from csd_exp.methods.base import from_source as from_source
from csd_exp.methods.base import needs_source as needs_source
from csd_exp.methods.inversion import ddim_edit as ddim_edit
from csd_exp.methods.inversion import ism as ism
from csd_exp.methods.inversion import sdi as sdi
from csd_exp.methods.pure import classifier_sd as classifier_sd
from csd_exp.methods.pure import dds as dds
from csd_exp.methods.pure import delta_velocity as delta_velocity
from csd_exp.methods.pure import pds as pds
from csd_exp.methods.pure import sds as sds
from csd_exp.methods.vsd import VSD as VSD
