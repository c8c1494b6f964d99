"""The schema of TFLite: the numbers of its operators, and the fields of their options.

References:
  https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from typing import Any

from smark_jax.files.networks.flatbuffer import Table

NAMES = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR
FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION
LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH
CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER
BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE
BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM
ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE
TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK
LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD
RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL REVERSE_V2 ADD_N
GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE
NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM BATCH_MATMUL
PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS HASHTABLE
HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE
ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU
DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2
UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT
""".split()
_CUSTOM = 32
_CONV = "padding:b stride_w:i stride_h:i activation:b dilation_w:i=1 dilation_h:i=1"
_POOL = "padding:b stride_w:i stride_h:i filter_w:i filter_h:i activation:b"
_REDUCTION = "keep_dims:b"
# The options of operators in the order of their fields: a name, a kind (b for a byte, i and f for int32 and float32, v
# for a vector of int32), and what an absent number is if not 0. A dash is a field that does not matter here.
_OPTIONS = {
    "CONV_2D": _CONV,
    "DEPTHWISE_CONV_2D": _CONV.replace("activation", "- activation"),
    "AVERAGE_POOL_2D": _POOL,
    "MAX_POOL_2D": _POOL,
    "FULLY_CONNECTED": "activation:b weights_format:b keep_dims:b",
    "ADD": "activation:b",
    "SUB": "activation:b",
    "MUL": "activation:b",
    "DIV": "activation:b",
    "SOFTMAX": "beta:f",
    "CONCATENATION": "axis:i activation:b",
    "RESHAPE": "new_shape:v",
    "SQUEEZE": "axes:v",
    "MEAN": _REDUCTION,
    "SUM": _REDUCTION,
    "REDUCE_PROD": _REDUCTION,
    "REDUCE_MAX": _REDUCTION,
    "REDUCE_MIN": _REDUCTION,
    "PACK": "- axis:i",
    "UNPACK": "num:i axis:i",
    "SPLIT": "num:i",
    "STRIDED_SLICE": "begin_mask:i end_mask:i ellipsis_mask:i new_axis_mask:i shrink_axis_mask:i offset:b",
    "GATHER": "axis:i batch_dims:i",
    "BATCH_MATMUL": "adjoint_x:b adjoint_y:b",
    "CAST": "- to:b",
    "GELU": "approximate:b",
    "LEAKY_RELU": "alpha:f",
    "MIRROR_PAD": "mode:b",
}


def name(code: Table) -> str:
    """The name of an entry in the model's list of operators; that of a custom one is its own."""
    number = max(code.number(0, "b"), code.number(3, "<i"))
    if number == _CUSTOM:
        return f"custom {code.text(1)}"
    return NAMES[number] if 0 <= number < len(NAMES) else f"operator {number}"


def settings(op: str, options: Table | None) -> dict[str, Any]:
    """The options of an operator by name."""
    found: dict[str, Any] = {}
    for field, text in enumerate(_OPTIONS.get(op, "").split()):
        key, _, kind = text.partition(":")
        kind, _, absent = kind.partition("=")
        if kind == "v":
            found[key] = [] if options is None else options.integers(field)
        elif kind:
            number = float(absent or 0) if kind == "f" else int(absent or 0)
            found[key] = number if options is None else options.number(field, f"<{kind}", number)
    return found
