"""TFLite: against its own interpreter, on files of TensorFlow's converter and on files written by hand."""

from pathlib import Path

import numpy as np
import pytest
import tflite_files
from tflite_files import Step, byte, quantised, real, whole

from smark_jax import alignment, carriers, errors, files
from smark_jax.files.networks import tflite_schema

FOLDER = Path(__file__).parent / "data" / "tflite"
RNG = np.random.default_rng(3)


def PART(*shape):
    return RNG.normal(size=shape).astype(np.float32)


INTS = lambda *numbers: np.array(numbers, np.int32)  # noqa: E731
PIXELS, POSITIVE = PART(2, 7, 6, 4), np.abs(PART(2, 7, 6, 4)) + np.float32(0.1)
TOKENS = PART(2, 5, 8)
CONV, DEPTHWISE, POOL, DENSE, SOFTMAX, CONCAT, REDUCE, CAST = 1, 2, 5, 8, 9, 10, 27, 37
SAME, VALID = byte(0), byte(1)
NONE, RELU, RELU_N1, RELU6, TANH = map(byte, range(5))
KEEP = {0: byte(1)}


def conv(padding, height, width, activation, *dilations):
    """Fields of Conv2DOptions."""
    return {0: padding, 1: whole(width), 2: whole(height), 3: activation, **dict(zip((5, 4), map(whole, dilations)))}


def pool(padding, height, width, rows, columns, activation=NONE):
    """Fields of Pool2DOptions: strides, then the window."""
    return {0: padding, 1: whole(width), 2: whole(height), 3: whole(columns), 4: whole(rows), 5: activation}


# By name: operator, inputs, and the type and the fields of its options.
CASES = {
    "conv": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(SAME, 2, 1, RELU)),
    "conv valid": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(VALID, 2, 2, RELU6)),
    "conv dilated": ("CONV_2D", [PIXELS, PART(6, 3, 2, 4), PART(6)], CONV, conv(SAME, 1, 1, RELU_N1, 2, 3)),
    "conv grouped": ("CONV_2D", [PIXELS, PART(6, 3, 2, 2), PART(6)], CONV, conv(SAME, 1, 1, NONE)),
    "depthwise": (
        "DEPTHWISE_CONV_2D", [PIXELS, PART(1, 3, 2, 8), PART(8)], DEPTHWISE,
        {0: SAME, 1: whole(2), 2: whole(2), 3: whole(2), 4: RELU},
    ),
    "depthwise dilated": (
        "DEPTHWISE_CONV_2D", [PIXELS, PART(1, 3, 2, 4), PART(4)], DEPTHWISE,
        {0: VALID, 1: whole(1), 2: whole(1), 3: whole(1), 4: NONE, 5: whole(3), 6: whole(2)},
    ),
    "max pool": ("MAX_POOL_2D", [PIXELS], POOL, pool(SAME, 2, 1, 3, 2, RELU)),
    "max pool valid": ("MAX_POOL_2D", [PIXELS], POOL, pool(VALID, 2, 2, 3, 2)),
    "mean pool": ("AVERAGE_POOL_2D", [PIXELS], POOL, pool(SAME, 2, 2, 3, 3)),
    "mean pool valid": ("AVERAGE_POOL_2D", [PIXELS], POOL, pool(VALID, 1, 2, 2, 3)),
    "dense": ("FULLY_CONNECTED", [TOKENS, PART(3, 8), PART(3)], DENSE, {0: RELU}),
    "dense keep": ("FULLY_CONNECTED", [TOKENS, PART(3, 8), PART(3)], DENSE, {2: byte(1)}),
    "matmul": ("BATCH_MATMUL", [TOKENS, PART(2, 8, 3)], 101, {}),
    "matmul turned": ("BATCH_MATMUL", [TOKENS, PART(2, 3, 8)], 101, {1: byte(1)}),
    "add": ("ADD", [PIXELS, PART(4)], 11, {0: RELU}),
    "sub": ("SUB", [PIXELS, PART(7, 6, 4)], 28, {}),
    "mul": ("MUL", [PIXELS, PART(2, 1, 1, 4)], 21, {0: RELU6}),
    "div": ("DIV", [PIXELS, POSITIVE], 29, {}),
    "squared difference": ("SQUARED_DIFFERENCE", [PIXELS, PART(4)], 76, {}),
    "maximum": ("MAXIMUM", [PIXELS, PART(1)], 39, {}),
    "minimum": ("MINIMUM", [PIXELS, PART(4)], 39, {}),
    "pow": ("POW", [POSITIVE, POSITIVE[0, 0, 0]], 56, {}),
    "sqrt": ("SQRT", [POSITIVE], 0, {}),
    "rsqrt": ("RSQRT", [POSITIVE], 0, {}),
    "square": ("SQUARE", [PIXELS], 66, {}),
    "exp": ("EXP", [PIXELS], 33, {}),
    "log": ("LOG", [POSITIVE], 0, {}),
    "abs": ("ABS", [PIXELS], 78, {}),
    "neg": ("NEG", [PIXELS], 42, {}),
    "sin": ("SIN", [PIXELS], 0, {}),
    "cos": ("COS", [PIXELS], 83, {}),
    "floor": ("FLOOR", [PIXELS], 0, {}),
    "ceil": ("CEIL", [PIXELS], 0, {}),
    "round": ("ROUND", [PIXELS], 0, {}),
    "relu": ("RELU", [PIXELS], 0, {}),
    "relu6": ("RELU6", [4 * PIXELS], 0, {}),
    "relu from -1 to 1": ("RELU_N1_TO_1", [PIXELS], 0, {}),
    "leaky relu": ("LEAKY_RELU", [PIXELS], 75, {0: real(0.3)}),
    "prelu": ("PRELU", [PIXELS, PART(1, 1, 4)], 0, {}),
    "elu": ("ELU", [PIXELS], 0, {}),
    "gelu": ("GELU", [PIXELS], 116, {}),
    "gelu by tanh": ("GELU", [PIXELS], 116, {0: byte(1)}),
    "hard swish": ("HARD_SWISH", [4 * PIXELS], 91, {}),
    "logistic": ("LOGISTIC", [PIXELS], 0, {}),
    "tanh": ("TANH", [PIXELS], 0, {}),
    "softmax": ("SOFTMAX", [TOKENS], SOFTMAX, {0: real(0.5)}),
    "log softmax": ("LOG_SOFTMAX", [TOKENS], 36, {}),
    "unit vectors": ("L2_NORMALIZATION", [PIXELS], 12, {}),
    "mean": ("MEAN", [PIXELS, INTS(1, 2)], REDUCE, {}),
    "mean keep": ("MEAN", [PIXELS, INTS(-1)], REDUCE, KEEP),
    "sum": ("SUM", [PIXELS, INTS(1)], REDUCE, KEEP),
    "largest": ("REDUCE_MAX", [PIXELS, INTS(2, 3)], REDUCE, {}),
    "smallest": ("REDUCE_MIN", [PIXELS, INTS(0)], REDUCE, {}),
    "product": ("REDUCE_PROD", [PIXELS, INTS(3)], REDUCE, {}),
    "reshape": ("RESHAPE", [PIXELS, INTS(2, -1)], 0, {}),
    "reshape by option": ("RESHAPE", [PIXELS], 17, {0: INTS(4, -1)}),
    "transpose": ("TRANSPOSE", [PIXELS, INTS(0, 3, 1, 2)], 26, {}),
    "expand": ("EXPAND_DIMS", [TOKENS, INTS(1)], 52, {}),
    "squeeze": ("SQUEEZE", [PART(2, 1, 5, 1)], 30, {0: INTS(1)}),
    "concatenation": ("CONCATENATION", [PIXELS, PART(2, 7, 6, 3)], CONCAT, {0: whole(-1)}),
    "pack": ("PACK", [TOKENS, TOKENS[::-1].copy()], 59, {0: whole(2), 1: whole(1)}),
    "unpack": ("UNPACK", [TOKENS], 64, {0: whole(5), 1: whole(1)}),
    "split": ("SPLIT", [INTS(3), PIXELS], 35, {0: whole(2)}),
    "split by sizes": ("SPLIT_V", [TOKENS, INTS(2, -1), INTS(1)], 79, {0: whole(2)}),
    "slice": ("SLICE", [PIXELS, INTS(0, 1, 2, 0), INTS(2, 3, -1, 4)], 48, {}),
    "strided slice": (
        "STRIDED_SLICE", [PIXELS, INTS(0, 1, 5, 1), INTS(9, 6, 0, 2), INTS(1, 2, -2, 1)], 32,
        {0: whole(1), 1: whole(1), 4: whole(8)},
    ),
    "strided slice, new axis": (
        "STRIDED_SLICE", [TOKENS, INTS(0, 0, 2), INTS(0, 0, 6), INTS(1, 1, 1)], 32, {2: whole(1), 3: whole(2)},
    ),
    "gather": ("GATHER", [PIXELS, INTS(2, 0)], 23, {0: whole(2)}),
    "broadcast": ("BROADCAST_TO", [PART(1, 5, 1), INTS(2, 5, 3)], 104, {}),
    "tile": ("TILE", [TOKENS, INTS(1, 2, 3)], 51, {}),
    "pad": ("PAD", [PIXELS, INTS(0, 0, 1, 2, 0, 3, 0, 0).reshape(4, 2)], 22, {}),
    "pad by a number": ("PADV2", [PIXELS, INTS(0, 0, 1, 2, 0, 3, 0, 0).reshape(4, 2), np.float32([-3])], 43, {}),
    "pad by reflection": ("MIRROR_PAD", [PIXELS, INTS(0, 0, 1, 2, 2, 3, 0, 0).reshape(4, 2)], 77, {}),
    "pad by symmetry": ("MIRROR_PAD", [PIXELS, INTS(0, 0, 1, 2, 2, 3, 0, 0).reshape(4, 2)], 77, {0: byte(1)}),
    "select": ("SELECT_V2", [PIXELS > 0, PIXELS, PART(4)], 98, {}),
    "select whole": ("SELECT", [PIXELS > 0, PIXELS, PIXELS[::-1].copy()], 47, {}),
    "equal": ("EQUAL", [PIXELS[:1], PIXELS], 53, {}),
    "not equal": ("NOT_EQUAL", [PIXELS[:1], PIXELS], 54, {}),
    "less": ("LESS", [PIXELS, PART(4)], 41, {}),
    "less or equal": ("LESS_EQUAL", [PIXELS[:1], PIXELS], 46, {}),
    "greater": ("GREATER", [PIXELS, PART(4)], 44, {}),
    "greater or equal": ("GREATER_EQUAL", [PIXELS[:1], PIXELS], 45, {}),
    "and": ("LOGICAL_AND", [PIXELS > 0, POSITIVE > 1], 61, {}),
    "or": ("LOGICAL_OR", [PIXELS > 0, POSITIVE > 1], 58, {}),
    "not": ("LOGICAL_NOT", [PIXELS > 0], 62, {}),
    "floor of a quotient": ("FLOOR_DIV", [PIXELS, POSITIVE], 65, {}),
    "rest": ("FLOOR_MOD", [PIXELS, POSITIVE], 72, {}),
    "sum of many": ("ADD_N", [TOKENS, PART(2, 5, 8), PART(2, 5, 8)], 82, {}),
    "fill": ("FILL", [INTS(2, 3), np.float32(0.5)], 68, {}),
    "sign": ("SIGN", [PIXELS], 122, {}),
    "relu from 0 to 1": ("RELU_0_TO_1", [PIXELS], 0, {}),
    "shape": ("SHAPE", [PIXELS], 55, {0: byte(2)}),
    "cast": ("CAST", [INTS(3, -2)], CAST, {0: byte(2), 1: byte(0)}),
    "dequantize": ("DEQUANTIZE", [PIXELS.astype(np.float16)], 0, {}),
}  # fmt: skip
CODES = {name: code for code, name in enumerate(tflite_schema._NAMES)}
