"""The public door to the ops: argument checks, the choice of backend, torch.library registration.

Conventions of every op here: per-row parameters are Python numbers or tensors of shape [B]; inputs are fp32, bf16 or
fp16, and rows may be strided. Log-probabilities, moments, losses, utilities and KL are fp32 whatever the input;
`tree_attention` returns the type of its query, gradients have that of their tensor, ids and counts are int64.
Randomness is a pure function of (seed, position) and so does not depend on the batch, the slot or the threads.
"""

from pyengine.ops.common import LAUNCHES
from pyengine.ops.head_tilt import head_tilt_sample
from pyengine.ops.linear_logprob import linear_logprob, logits_logprob
from pyengine.ops.linear_preference import linear_preference
from pyengine.ops.select_block import select_block
from pyengine.ops.tilt import tilt_sample
from pyengine.ops.tree_attention import tree_attention
from pyengine.reference import (
    BlockSelection,
    PairedLoss,
    Preference,
    SequenceMoments,
    TiltSample,
    TokenLogprob,
    Tree,
)

__all__ = [
    "LAUNCHES",
    "BlockSelection",
    "PairedLoss",
    "Preference",
    "SequenceMoments",
    "TiltSample",
    "TokenLogprob",
    "Tree",
    "head_tilt_sample",
    "linear_logprob",
    "linear_preference",
    "logits_logprob",
    "select_block",
    "tilt_sample",
    "tree_attention",
]
