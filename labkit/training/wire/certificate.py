"""The certificate of one run's server: a new key on the curve P-256 and an X.509 certificate that it signs itself.

The standard library's `ssl` uses keys and certificates and cannot make them; what that takes is here, so that nothing else has to be
installed: points of the curve, ECDSA with SHA-256 (FIPS 186-4) and the few pieces of DER (X.690) that RFC 5280 asks for.

The arithmetic is not of constant time. It is done once, at the start of a run, for a key that is new and signs here a single time; in
each handshake OpenSSL signs.

Used by `labkit.training.wire.tls`.
"""

import base64
import hashlib
import secrets
import textwrap

P = 2**256 - 2**224 + 2**192 + 2**96 - 1  # y² = x³ - 3x + b over this field (SEC 2, 2.4.2)
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # how many points G makes
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)

ID_EC_PUBLIC_KEY = bytes.fromhex("06072a8648ce3d0201")  # object identifiers, in DER
PRIME256V1 = bytes.fromhex("06082a8648ce3d030107")
ECDSA_WITH_SHA256 = bytes.fromhex("06082a8648ce3d040302")
COMMON_NAME = bytes.fromhex("0603550403")
BASIC_CONSTRAINTS = bytes.fromhex("0603551d13")
TRUE = b"\x01\x01\xff"

INTEGER, BIT_STRING, OCTET_STRING, UTF8_STRING, UTC_TIME, GENERALIZED_TIME, SEQUENCE, SET = 2, 3, 4, 12, 23, 24, 0x30, 0x31
EXPLICIT = 0xA0  # and the number of the field


def made(name: str = "labkit") -> tuple[str, str]:
    """A new private key and its certificate, both in PEM.

    It holds from 1970 on and has no end (RFC 5280, 4.1.2.5): clocks of machines differ, and it is trusted by nobody but who was given it.
    """
    key = 1 + secrets.randbelow(N - 1)
    point = b"\x04" + b"".join(each.to_bytes(32, "big") for each in _times(key, G))
    who = _der(SEQUENCE, _der(SET, _der(SEQUENCE, COMMON_NAME, _der(UTF8_STRING, name.encode()))))
    no_authority = _der(SEQUENCE, BASIC_CONSTRAINTS, TRUE, _der(OCTET_STRING, _der(SEQUENCE)))
    to_be_signed = _der(
        SEQUENCE,
        _der(EXPLICIT, _integer(2)),  # version 3
        _integer(1 + secrets.randbits(126)),  # its number
        _der(SEQUENCE, ECDSA_WITH_SHA256),
        who,  # the issuer
        _der(SEQUENCE, _der(UTC_TIME, b"700101000000Z"), _der(GENERALIZED_TIME, b"99991231235959Z")),
        who,  # the subject
        _der(SEQUENCE, _der(SEQUENCE, ID_EC_PUBLIC_KEY, PRIME256V1), _bits(point)),
        _der(EXPLICIT + 3, _der(SEQUENCE, no_authority)),
    )
    signature = _der(SEQUENCE, *map(_integer, _signature(key, to_be_signed)))
    certificate = _der(SEQUENCE, to_be_signed, _der(SEQUENCE, ECDSA_WITH_SHA256), _bits(signature))
    private = _der(
        SEQUENCE,
        _integer(1),
        _der(OCTET_STRING, key.to_bytes(32, "big")),
        _der(EXPLICIT, PRIME256V1),
        _der(EXPLICIT + 1, _bits(point)),
    )
    return _pem("EC PRIVATE KEY", private), _pem("CERTIFICATE", certificate)


def _signature(key: int, message: bytes) -> tuple[int, int]:
    """ECDSA: r and s."""
    digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
    while True:
        once = 1 + secrets.randbelow(N - 1)
        r = _times(once, G)[0] % N
        s = pow(once, -1, N) * (digest + r * key) % N
        if r and s:
            return r, s


def _times(factor: int, point: tuple[int, int]) -> tuple[int, int]:
    """A point of the curve, `factor` times; 0 < factor < N."""
    total = None
    while factor:
        if factor & 1:
            total = point if total is None else _sum(total, point)
        factor >>= 1
        point = _sum(point, point) if factor else point
    return total


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Of two points that are not each other's negatives."""
    slope = 3 * (a[0] * a[0] - 1) * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (length if len(content) < 128 else bytes([128 + len(length)]) + length) + content


def _integer(value: int) -> bytes:
    return _der(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))  # with a bit for the sign


def _bits(content: bytes) -> bytes:
    return _der(BIT_STRING, b"\0", content)  # of the last byte no bit is unused


def _pem(label: str, content: bytes) -> str:
    text = "\n".join(textwrap.wrap(base64.b64encode(content).decode(), 64))
    return f"-----BEGIN {label}-----\n{text}\n-----END {label}-----\n"
