"""Pure tensor functions, each with fast versions and a reference. Only first-order gradients; most are hand-written."""

from importlib import import_module
from pkgutil import iter_modules

from explore.ops.activation import Activation, activate, is_gated
from explore.ops.attention import attention, rotate
from explore.ops.calibration import CalibratedQuantizer, Observer
from explore.ops.compilation import (
    NO_COMPILER,
    CompilerError,
    check_compiler,
    compiled,
    compiled_step,
    compiler_failure,
    falling_back,
    has_compiler,
)
from explore.ops.conv import causal_conv1d
from explore.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrent
from explore.ops.divergence import Divergence, linear_kl, logits_kl
from explore.ops.experts import Visit, experts, visits
from explore.ops.hadamard import hadamard
from explore.ops.linear import linear
from explore.ops.loss import linear_cross_entropy
from explore.ops.low_precision import Emulation, Quantizer
from explore.ops.norm import gated_group_rms_norm, l2_norm, rms_norm, rms_norm_before_gate
from explore.ops.paths import (
    PATHS,
    OpPath,
    forced_paths,
    is_forced,
    path_of,
    paths_in_use,
    paths_that,
    same_paths,
)
from explore.ops.quantize import quantize
from explore.ops.rounding import rounding_generator, value_spacing
from explore.ops.ssd import ssd, ssd_chunked, ssd_recurrent
from explore.ops.state_rounding import StateRounding
from explore.ops.weight_scales import SCALES, Scales, quantize_weight

for _module in iter_modules(__path__):  # each module declares the paths of its ops when it is imported
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "NO_COMPILER",
    "PATHS",
    "SCALES",
    "Activation",
    "CalibratedQuantizer",
    "CompilerError",
    "Divergence",
    "Emulation",
    "Observer",
    "OpPath",
    "Quantizer",
    "Scales",
    "StateRounding",
    "Visit",
    "activate",
    "attention",
    "causal_conv1d",
    "check_compiler",
    "compiled",
    "compiled_step",
    "compiler_failure",
    "delta_rule",
    "delta_rule_chunked",
    "delta_rule_recurrent",
    "experts",
    "falling_back",
    "forced_paths",
    "gated_group_rms_norm",
    "hadamard",
    "has_compiler",
    "is_forced",
    "is_gated",
    "l2_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "logits_kl",
    "path_of",
    "paths_in_use",
    "paths_that",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rms_norm_before_gate",
    "rotate",
    "rounding_generator",
    "same_paths",
    "ssd",
    "ssd_chunked",
    "ssd_recurrent",
    "value_spacing",
    "visits",
]
