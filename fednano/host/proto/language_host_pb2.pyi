# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    INT8: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
INT8: DType

class Packed(_message.Message):
    __slots__ = ("dtype", "hidden_size", "lengths", "scale", "images")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    hidden_size: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    scale: float
    images: _containers.RepeatedCompositeFieldContainer[ImageSpan]
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., hidden_size: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., scale: _Optional[float] = ..., images: _Optional[_Iterable[_Union[ImageSpan, _Mapping]]] = ...) -> None: ...

class ImageSpan(_message.Message):
    __slots__ = ("sample", "start", "height", "width")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    sample: int
    start: int
    height: int
    width: int
    def __init__(self, sample: _Optional[int] = ..., start: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("fingerprint", "hidden_size", "vocab_size", "max_positions", "dtype", "eos_token_ids", "pad_token_id", "objectives", "limits", "version", "images", "lossless")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAD_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    pad_token_id: int
    objectives: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    version: str
    images: str
    lossless: bool
    def __init__(self, fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_positions: _Optional[int] = ..., dtype: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., pad_token_id: _Optional[int] = ..., objectives: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., version: _Optional[str] = ..., images: _Optional[str] = ..., lossless: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_batch", "max_tokens", "max_new_tokens", "max_request_bytes")
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_batch: int
    max_tokens: int
    max_new_tokens: int
    max_request_bytes: int
    def __init__(self, max_batch: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_request_bytes: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("counters",)
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("header", "chunk", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: StepHeader
    chunk: bytes
    coded: bytes
    def __init__(self, header: _Optional[_Union[StepHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class StepHeader(_message.Message):
    __slots__ = ("request_id", "fingerprint", "objective", "embeds", "want_gradient", "lossless")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    WANT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    objective: str
    embeds: Packed
    want_gradient: bool
    lossless: bool
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., objective: _Optional[str] = ..., embeds: _Optional[_Union[Packed, _Mapping]] = ..., want_gradient: _Optional[bool] = ..., lossless: _Optional[bool] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("header", "chunk", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: StepResult
    chunk: bytes
    coded: bytes
    def __init__(self, header: _Optional[_Union[StepResult, _Mapping]] = ..., chunk: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("losses", "gradient")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    losses: _containers.RepeatedScalarFieldContainer[float]
    gradient: Packed
    def __init__(self, losses: _Optional[_Iterable[float]] = ..., gradient: _Optional[_Union[Packed, _Mapping]] = ...) -> None: ...

class KeepRequest(_message.Message):
    __slots__ = ("header", "chunk", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: KeepHeader
    chunk: bytes
    coded: bytes
    def __init__(self, header: _Optional[_Union[KeepHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class KeepHeader(_message.Message):
    __slots__ = ("request_id", "fingerprint", "embeds", "keys")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    embeds: Packed
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., embeds: _Optional[_Union[Packed, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KeepReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FactoredRequest(_message.Message):
    __slots__ = ("header", "chunk", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: FactoredHeader
    chunk: bytes
    coded: bytes
    def __init__(self, header: _Optional[_Union[FactoredHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class FactoredHeader(_message.Message):
    __slots__ = ("request_id", "fingerprint", "objective", "keys", "dtype", "ranks", "want_gradient", "weights", "lossless")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WANT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    objective: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    dtype: DType
    ranks: _containers.RepeatedScalarFieldContainer[int]
    want_gradient: bool
    weights: _containers.RepeatedScalarFieldContainer[float]
    lossless: bool
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., objective: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., dtype: _Optional[_Union[DType, str]] = ..., ranks: _Optional[_Iterable[int]] = ..., want_gradient: _Optional[bool] = ..., weights: _Optional[_Iterable[float]] = ..., lossless: _Optional[bool] = ...) -> None: ...

class PrivateRequest(_message.Message):
    __slots__ = ("header", "chunk", "gradient", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: PrivateHeader
    chunk: bytes
    gradient: Packed
    coded: bytes
    def __init__(self, header: _Optional[_Union[PrivateHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., gradient: _Optional[_Union[Packed, _Mapping]] = ..., coded: _Optional[bytes] = ...) -> None: ...

class PrivateHeader(_message.Message):
    __slots__ = ("request_id", "fingerprint", "embeds", "labelled", "want_gradient", "lossless")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    LABELLED_FIELD_NUMBER: _ClassVar[int]
    WANT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    LOSSLESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    embeds: Packed
    labelled: _containers.RepeatedScalarFieldContainer[int]
    want_gradient: bool
    lossless: bool
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., embeds: _Optional[_Union[Packed, _Mapping]] = ..., labelled: _Optional[_Iterable[int]] = ..., want_gradient: _Optional[bool] = ..., lossless: _Optional[bool] = ...) -> None: ...

class PrivateReply(_message.Message):
    __slots__ = ("hidden", "chunk", "gradient", "coded")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    hidden: Packed
    chunk: bytes
    gradient: Packed
    coded: bytes
    def __init__(self, hidden: _Optional[_Union[Packed, _Mapping]] = ..., chunk: _Optional[bytes] = ..., gradient: _Optional[_Union[Packed, _Mapping]] = ..., coded: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("header", "chunk", "coded")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    header: GenerateHeader
    chunk: bytes
    coded: bytes
    def __init__(self, header: _Optional[_Union[GenerateHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class GenerateHeader(_message.Message):
    __slots__ = ("request_id", "fingerprint", "embeds", "max_new_tokens", "client_embeds")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    embeds: Packed
    max_new_tokens: int
    client_embeds: bool
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., embeds: _Optional[_Union[Packed, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., client_embeds: _Optional[bool] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...
