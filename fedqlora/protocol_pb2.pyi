from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    DESCRIBE: _ClassVar[Kind]
    TRAIN: _ClassVar[Kind]
    EVALUATE: _ClassVar[Kind]
    CONFIRM: _ClassVar[Kind]
    UNMASK: _ClassVar[Kind]
    WRAP: _ClassVar[Kind]
    DECRYPT: _ClassVar[Kind]
    DESCRIPTION: _ClassVar[Kind]
    UPDATE: _ClassVar[Kind]
    EVALUATION: _ClassVar[Kind]
    CONFIRMATION: _ClassVar[Kind]
    UNMASKING: _ClassVar[Kind]
    WRAPPED_KEY: _ClassVar[Kind]
    DECRYPTION: _ClassVar[Kind]
    REFUSAL: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
DESCRIBE: Kind
TRAIN: Kind
EVALUATE: Kind
CONFIRM: Kind
UNMASK: Kind
WRAP: Kind
DECRYPT: Kind
DESCRIPTION: Kind
UPDATE: Kind
EVALUATION: Kind
CONFIRMATION: Kind
UNMASKING: Kind
WRAPPED_KEY: Kind
DECRYPTION: Kind
REFUSAL: Kind

class Envelope(_message.Message):
    __slots__ = ("header", "signature", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    signature: bytes
    payload: bytes
    def __init__(self, header: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("version", "run", "round", "site", "kind", "issued", "payload_digest", "replies_to", "own_number", "own_head", "seen_number", "seen_head")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ISSUED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLIES_TO_FIELD_NUMBER: _ClassVar[int]
    OWN_NUMBER_FIELD_NUMBER: _ClassVar[int]
    OWN_HEAD_FIELD_NUMBER: _ClassVar[int]
    SEEN_NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEEN_HEAD_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    round: int
    site: str
    kind: Kind
    issued: int
    payload_digest: bytes
    replies_to: bytes
    own_number: int
    own_head: bytes
    seen_number: int
    seen_head: bytes
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., site: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., issued: _Optional[int] = ..., payload_digest: _Optional[bytes] = ..., replies_to: _Optional[bytes] = ..., own_number: _Optional[int] = ..., own_head: _Optional[bytes] = ..., seen_number: _Optional[int] = ..., seen_head: _Optional[bytes] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("encoding", "data")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    data: bytes
    def __init__(self, encoding: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Describe(_message.Message):
    __slots__ = ("config", "ledger_heads", "next_round", "app_digest")
    class LedgerHeadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEADS_FIELD_NUMBER: _ClassVar[int]
    NEXT_ROUND_FIELD_NUMBER: _ClassVar[int]
    APP_DIGEST_FIELD_NUMBER: _ClassVar[int]
    config: str
    ledger_heads: _containers.ScalarMap[str, str]
    next_round: int
    app_digest: str
    def __init__(self, config: _Optional[str] = ..., ledger_heads: _Optional[_Mapping[str, str]] = ..., next_round: _Optional[int] = ..., app_digest: _Optional[str] = ...) -> None: ...

class Train(_message.Message):
    __slots__ = ("config", "adapter", "residual", "control", "anchor", "ledger_heads", "round_keys", "encryption_key", "app_digest")
    class LedgerHeadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEADS_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEYS_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_KEY_FIELD_NUMBER: _ClassVar[int]
    APP_DIGEST_FIELD_NUMBER: _ClassVar[int]
    config: str
    adapter: Tensors
    residual: Tensors
    control: Tensors
    anchor: Tensors
    ledger_heads: _containers.ScalarMap[str, str]
    round_keys: _containers.RepeatedCompositeFieldContainer[RoundKey]
    encryption_key: WrappedKey
    app_digest: str
    def __init__(self, config: _Optional[str] = ..., adapter: _Optional[_Union[Tensors, _Mapping]] = ..., residual: _Optional[_Union[Tensors, _Mapping]] = ..., control: _Optional[_Union[Tensors, _Mapping]] = ..., anchor: _Optional[_Union[Tensors, _Mapping]] = ..., ledger_heads: _Optional[_Mapping[str, str]] = ..., round_keys: _Optional[_Iterable[_Union[RoundKey, _Mapping]]] = ..., encryption_key: _Optional[_Union[WrappedKey, _Mapping]] = ..., app_digest: _Optional[str] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("config", "adapter", "residual")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    config: str
    adapter: Tensors
    residual: Tensors
    def __init__(self, config: _Optional[str] = ..., adapter: _Optional[_Union[Tensors, _Mapping]] = ..., residual: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class Confirm(_message.Message):
    __slots__ = ("config", "alive")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    config: str
    alive: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, config: _Optional[str] = ..., alive: _Optional[_Iterable[str]] = ...) -> None: ...

class Unmask(_message.Message):
    __slots__ = ("config", "signatures", "sealed")
    class SignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class SealedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    config: str
    signatures: _containers.ScalarMap[str, bytes]
    sealed: _containers.ScalarMap[str, bytes]
    def __init__(self, config: _Optional[str] = ..., signatures: _Optional[_Mapping[str, bytes]] = ..., sealed: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Wrap(_message.Message):
    __slots__ = ("config", "round_keys")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEYS_FIELD_NUMBER: _ClassVar[int]
    config: str
    round_keys: _containers.RepeatedCompositeFieldContainer[RoundKey]
    def __init__(self, config: _Optional[str] = ..., round_keys: _Optional[_Iterable[_Union[RoundKey, _Mapping]]] = ...) -> None: ...

class Decrypt(_message.Message):
    __slots__ = ("config", "alive", "ciphertexts", "checksums")
    class ChecksumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    config: str
    alive: _containers.RepeatedScalarFieldContainer[str]
    ciphertexts: _containers.RepeatedScalarFieldContainer[bytes]
    checksums: _containers.ScalarMap[str, bytes]
    def __init__(self, config: _Optional[str] = ..., alive: _Optional[_Iterable[str]] = ..., ciphertexts: _Optional[_Iterable[bytes]] = ..., checksums: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class TensorShape(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("base_digest", "family", "tensors", "given", "software", "ledger_head", "round_key")
    class SoftwareEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    family: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorShape]
    given: Tensors
    software: _containers.ScalarMap[str, str]
    ledger_head: str
    round_key: RoundKey
    def __init__(self, base_digest: _Optional[str] = ..., family: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorShape, _Mapping]]] = ..., given: _Optional[_Union[Tensors, _Mapping]] = ..., software: _Optional[_Mapping[str, str]] = ..., ledger_head: _Optional[str] = ..., round_key: _Optional[_Union[RoundKey, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("delta", "examples", "tokens", "metrics", "control", "ledger_head", "receipt", "masked", "encrypted", "round_key")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DELTA_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    delta: Tensors
    examples: int
    tokens: int
    metrics: _containers.ScalarMap[str, float]
    control: Tensors
    ledger_head: str
    receipt: bytes
    masked: Masked
    encrypted: Encrypted
    round_key: RoundKey
    def __init__(self, delta: _Optional[_Union[Tensors, _Mapping]] = ..., examples: _Optional[int] = ..., tokens: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., control: _Optional[_Union[Tensors, _Mapping]] = ..., ledger_head: _Optional[str] = ..., receipt: _Optional[bytes] = ..., masked: _Optional[_Union[Masked, _Mapping]] = ..., encrypted: _Optional[_Union[Encrypted, _Mapping]] = ..., round_key: _Optional[_Union[RoundKey, _Mapping]] = ...) -> None: ...

class RoundKey(_message.Message):
    __slots__ = ("site", "public", "signature")
    SITE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    site: str
    public: bytes
    signature: bytes
    def __init__(self, site: _Optional[str] = ..., public: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Masked(_message.Message):
    __slots__ = ("values", "sealed")
    class SealedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    sealed: _containers.ScalarMap[str, bytes]
    def __init__(self, values: _Optional[bytes] = ..., sealed: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Encrypted(_message.Message):
    __slots__ = ("ciphertexts", "checksum")
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ciphertexts: _containers.RepeatedScalarFieldContainer[bytes]
    checksum: bytes
    def __init__(self, ciphertexts: _Optional[_Iterable[bytes]] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class WrappedKey(_message.Message):
    __slots__ = ("sealed", "wrapped")
    class WrappedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SEALED_FIELD_NUMBER: _ClassVar[int]
    WRAPPED_FIELD_NUMBER: _ClassVar[int]
    sealed: bytes
    wrapped: _containers.ScalarMap[str, bytes]
    def __init__(self, sealed: _Optional[bytes] = ..., wrapped: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Decryption(_message.Message):
    __slots__ = ("values", "round_key")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    round_key: RoundKey
    def __init__(self, values: _Optional[bytes] = ..., round_key: _Optional[_Union[RoundKey, _Mapping]] = ...) -> None: ...

class Confirmation(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    def __init__(self, signature: _Optional[bytes] = ...) -> None: ...

class Unmasking(_message.Message):
    __slots__ = ("shares", "round_key")
    SHARES_FIELD_NUMBER: _ClassVar[int]
    ROUND_KEY_FIELD_NUMBER: _ClassVar[int]
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    round_key: RoundKey
    def __init__(self, shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., round_key: _Optional[_Union[RoundKey, _Mapping]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("site", "peer", "value")
    SITE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    site: str
    peer: str
    value: bytes
    def __init__(self, site: _Optional[str] = ..., peer: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("subsets",)
    class SubsetsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scores
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scores, _Mapping]] = ...) -> None: ...
    SUBSETS_FIELD_NUMBER: _ClassVar[int]
    subsets: _containers.MessageMap[str, Scores]
    def __init__(self, subsets: _Optional[_Mapping[str, Scores]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "rule", "sentence")
    CODE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    code: str
    rule: str
    sentence: str
    def __init__(self, code: _Optional[str] = ..., rule: _Optional[str] = ..., sentence: _Optional[str] = ...) -> None: ...
