"""The public door to the ops: argument checks, the choice of backend, torch.library registration.

Conventions of every op here: per-row parameters are Python numbers or tensors of shape [B];
outputs are fp32 whatever the input type (fp32, bf16, fp16); rows may be strided; randomness is a
pure function of (seed, position) and so does not depend on the batch, the slot or the threads.
"""

from pyengine.ops.common import LAUNCHES
from pyengine.ops.select_block import select_block
from pyengine.ops.tilt import tilt_sample
from pyengine.reference import BlockSelection, TiltSample

__all__ = ["LAUNCHES", "BlockSelection", "TiltSample", "select_block", "tilt_sample"]
