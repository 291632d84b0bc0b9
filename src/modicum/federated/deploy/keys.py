"""Certificates for the server's TLS, and the keys by which it knows its nodes."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from modicum.errors import UsageError

CA, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"


def make_certificates(folder: str | Path, hosts: Sequence[str], days: int = 825) -> Path:
    """Write ``ca.pem``, which nodes trust, and ``server.pem`` and ``server.key``; returns ca.pem.

    `hosts` are the names and addresses by which nodes reach the server; its own processes reach it
    by the loopback interface, which is added.  The authority's own key is forgotten: for another
    certificate there is another authority.  Raises UsageError for a folder that has one, since its
    nodes would no longer be able to connect.
    """
    place = Path(folder)
    if not hosts:
        raise UsageError("a certificate is for at least one host")
    if (place / CA).exists():
        raise UsageError(f"{place / CA} exists", hint="another folder, or delete it first")
    place.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = _name("modicum federation")
    ca = _certificate(authority, authority, authority_key, authority_key, days, hosts=None)
    names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    server = _certificate(_name(hosts[0]), authority, server_key, authority_key, days, hosts=names)
    _write(place / KEY, _pem(server_key), private=True)
    _write(place / CERTIFICATE, server.public_bytes(Encoding.PEM))
    _write(place / CA, ca.public_bytes(Encoding.PEM))
    return place / CA


def make_node_key(path: str | Path) -> Path:
    """Write a node's private key, and beside it with ``.pub`` the public one that is registered.

    EC P-384 in OpenSSH's format, as Flower wants it; returns the public key's path.  Raises
    UsageError where there is a key: a node that loses it is another node.
    """
    private = Path(path)
    public = private.with_name(private.name + ".pub")
    if private.exists() or public.exists():
        raise UsageError(f"{private} exists", hint="another name, or delete it first")
    private.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write(
        private,
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        private=True,
    )
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return public


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    hosts: Sequence[str] | None,
) -> x509.Certificate:
    """An authority's own certificate without `hosts`, otherwise that of a server."""
    now = datetime.now(timezone.utc)
    ca = hosts is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of boards are not exact
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
                key_encipherment=False, data_encipherment=False, key_agreement=False,
                encipher_only=False, decipher_only=False,
            ),
            critical=True,
        )
    )  # fmt: skip
    if hosts is not None:
        names = x509.SubjectAlternativeName([_host(h) for h in hosts])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(names, critical=False).add_extension(usage, critical=False)
    return builder.sign(signer, hashes.SHA384())


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, private: bool = False) -> None:
    """A private file is never readable by others, not even before it is complete."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    if not private:
        path.chmod(0o644)
