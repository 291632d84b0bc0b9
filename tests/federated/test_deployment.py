"""Flower's deployment engine on the loopback interface: TLS, and only nodes that are registered."""

from __future__ import annotations

import os
import ssl
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from federated.test_engines import descendants, in_one_process

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.federated.app.task import Settings
from modicum.federated.deploy.keys import make_certificates, make_node_key
from modicum.federated.deploy.loopback import Loopback
from modicum.federated.deploy.meter import Meter
from modicum.federated.deploy.processes import Processes, pairs, supernode, toml
from modicum.federated.strategy import STATE, read_history


@pytest.mark.slow
def test_two_nodes_agree_with_one_process_and_strangers_are_refused(tmp_path: Path) -> None:
    settings = Settings(
        rounds=2, clients=2, rule='{"kind": "tinymetafed", "clients": 2}',
        out=str(tmp_path / "out"), timeout=300,
    )  # fmt: skip
    before = descendants()
    with Loopback(tmp_path / "fleet") as fleet, Meter(fleet.port) as meter:
        for client in range(2):
            fleet.add_node({"partition-id": client}, meter.port)
        fleet.await_nodes()
        run = fleet.submit(settings.config())
        stranger = fleet.folder / "stranger"
        make_node_key(stranger)
        elsewhere = make_certificates(tmp_path / "elsewhere", ["127.0.0.1"])
        ca, known = fleet.folder / "ca.pem", fleet.folder / "node-0"
        unknown = fleet.start_node({"partition-id": 0}, stranger, ca, retries=2)
        deceived = fleet.start_node({"partition-id": 0}, known, elsewhere, retries=2)
        assert unknown.process.wait(120) != 0
        assert deceived.process.wait(120) != 0
        fleet.wait(run, 600)
        up, down = meter.bytes
        assert "No SuperNode found with the given public key" in fleet.server.said()
        assert "CERTIFICATE_VERIFY_FAILED" in deceived.said()
    until = time.monotonic() + 20
    while descendants() - before and time.monotonic() < until:
        time.sleep(0.2)
    assert not descendants() - before

    expected = in_one_process(
        settings.model_copy(update={"out": "", "cache": str(tmp_path / "cache")})
    )
    rounds, _ = read_history(tmp_path / "out", 2)
    assert [r.used for r in rounds] == [[0, 1], [0, 1]]
    assert [r.bytes_up for r in rounds] == [r.bytes_up for r in expected.rounds]
    found = np.load(tmp_path / "out" / STATE)["theta"]
    np.testing.assert_allclose(found, expected.server.theta, atol=1e-6)
    assert up > sum(r.bytes_up for r in rounds)
    assert down > sum(r.bytes_down for r in rounds)


def test_a_certificate_is_for_its_hosts_and_keys_are_private(tmp_path: Path) -> None:
    ca = make_certificates(tmp_path, ["192.168.1.10", "pc.local"])
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["pc.local"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.168.1.10"]
    context = ssl.create_default_context(cafile=str(ca))
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists"):
        make_certificates(tmp_path, ["pc.local"])


def test_a_node_key_is_a_pair_in_the_format_of_openssh(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node-0")
    private = load_ssh_private_key((tmp_path / "node-0").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key(public.read_bytes())
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert stat.S_IMODE((tmp_path / "node-0").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists"):
        make_node_key(tmp_path / "node-0")


def test_a_configuration_is_written_as_flower_reads_it() -> None:
    assert (
        pairs({"partition-id": 1, "link": "/dev/ttyACM0"}) == 'partition-id=1 link="/dev/ttyACM0"'
    )
    assert toml({"rule": '{"top": 0.1}'}) == 'rule = "{\\"top\\": 0.1}"\n'
    with pytest.raises(InvalidInput, match="control"):
        toml({"rule": "a\nb"})
    with pytest.raises(InvalidInput, match="partition-id"):
        supernode("127.0.0.1:8000", Path("ca.pem"), Path("key"), {"learner": "native"})


def test_what_was_started_is_stopped_with_all_that_it_has_started(tmp_path: Path) -> None:
    started = []

    def fail_midway() -> None:
        with Processes(os.environ) as processes:
            script = "sleep 600 & sleep 600 & trap '' TERM; echo up; wait"
            started.append(processes.start(["sh", "-c", script], tmp_path / "log"))
            while "up" not in started[0].said():
                time.sleep(0.05)
            assert len(descendants(started[0].pid)) == 2
            raise ModicumError("midway")

    with pytest.raises(ModicumError, match="midway"):
        fail_midway()
    assert started[0].process.returncode is not None
    assert not descendants(started[0].pid)
