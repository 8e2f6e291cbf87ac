"""Keys and certificates: what OpenSSL and others say of them, and the published example of the arithmetic."""

from __future__ import annotations

import ssl

import pytest

from labkit.training.wire import certificate

# RFC 6979, A.2.5: key, its point, and the signature of "sample" with SHA-256 and this k
KEY = 0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721
POINT = (
    0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6,
    0x7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299,
)
K = 0xA6E3C57DD01ABE90086538398355DD4C3B17AA873382B0F24D6129493D8AAD60
SIGNATURE = (
    0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
    0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
)


def test_the_arithmetic_is_that_of_the_published_example(monkeypatch):
    assert certificate._times(KEY, certificate.G) == POINT
    assert certificate._times(certificate.N - 1, certificate.G) == (certificate.G[0], certificate.P - certificate.G[1])
    monkeypatch.setattr(certificate.secrets, "randbelow", lambda below: K - 1)
    assert certificate._signature(KEY, b"sample") == SIGNATURE


@pytest.mark.parametrize(
    ("value", "der"),
    [(0, "020100"), (127, "02017f"), (128, "02020080"), (256, "02020100"), (1 << 1022, "02818040" + 127 * "00")],
)
def test_integers_and_lengths_are_as_short_as_der_wants_them(value, der):
    assert certificate._integer(value) == bytes.fromhex(der)


def test_openssl_takes_key_and_certificate(tmp_path):
    key, made = certificate.made("a run")
    other, _ = certificate.made()
    (tmp_path / "both.pem").write_text(key + made)
    (tmp_path / "other.pem").write_text(other + made)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        context.load_cert_chain(tmp_path / "other.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=made)


def test_others_find_it_well_signed_and_no_authority():
    x509 = pytest.importorskip("cryptography.x509")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    for _ in range(3):
        key, made = certificate.made()
        read, private = x509.load_pem_x509_certificate(made.encode()), serialization.load_pem_private_key(key.encode(), None)
        read.verify_directly_issued_by(read)
        assert read.public_key().public_numbers() == private.public_key().public_numbers()
        assert read.version is x509.Version.v3 and 0 < read.serial_number < 1 << 127
        assert not read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
