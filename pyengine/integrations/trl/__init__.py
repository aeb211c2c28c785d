"""TRL's trainers on pyengine's LM head: paired and unpaired preferences with WPO's weights, offline alignment.

`runs.py` is what the commands call: from a file of examples to the directory of a policy.
"""

from pyengine.integrations.trl.offline import OfflineConfig, OfflineTrainer
from pyengine.integrations.trl.preference import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer

__all__ = [
    "OfflineConfig",
    "OfflineTrainer",
    "PreferenceConfig",
    "PreferenceTrainer",
    "UnpairedConfig",
    "UnpairedTrainer",
]
