"""llm-compressor's door: thin modifiers that call the rooms below. Importing this registers them.

In: llm-compressor's session with a model and calibration data. Out: the same model, selected, trained or cut, and saved
as it is. From here up llm-compressor is known.
"""

from llmcompressor.modifiers import ModifierFactory

from amoeba_plugin.modifiers.depth import DepthShrinkingModifier, QuestionOptions
from amoeba_plugin.modifiers.extraction import SubnetExtractionModifier
from amoeba_plugin.modifiers.layer_tuning import AdaptiveLayerTuningModifier
from amoeba_plugin.modifiers.layer_tuning_fields import ExitOptions
from amoeba_plugin.modifiers.layerwise_policy import LayerwisePolicyModifier
from amoeba_plugin.modifiers.one_for_all import OneForAllDistillationModifier
from amoeba_plugin.modifiers.one_for_all_fields import AdapterOptions
from amoeba_plugin.modifiers.session_training import TrainingEventsCallback, TrainingEventsMixin, begin_session
from amoeba_plugin.modifiers.smoothing import complete_tables
from amoeba_plugin.modifiers.width import WidthShrinkingModifier

__all__ = [
    "AdapterOptions",
    "AdaptiveLayerTuningModifier",
    "DepthShrinkingModifier",
    "ExitOptions",
    "LayerwisePolicyModifier",
    "OneForAllDistillationModifier",
    "QuestionOptions",
    "SubnetExtractionModifier",
    "TrainingEventsCallback",
    "TrainingEventsMixin",
    "WidthShrinkingModifier",
    "begin_session",
    "register_with_llmcompressor",
]


def register_with_llmcompressor() -> None:
    """Make the modifiers known to recipes, under their class names; calling it twice changes nothing."""
    for modifier in (
        DepthShrinkingModifier,
        WidthShrinkingModifier,
        OneForAllDistillationModifier,
        SubnetExtractionModifier,
        LayerwisePolicyModifier,
        AdaptiveLayerTuningModifier,
    ):
        ModifierFactory.register(modifier.__name__, modifier)
    complete_tables()


register_with_llmcompressor()
