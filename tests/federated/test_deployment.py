"""Flower's deployment engine on the loopback interface: TLS, and only nodes that are registered."""

from __future__ import annotations

import os
import signal
import ssl
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from federated.test_engines import in_one_process, inheriting

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.federated.app.task import Settings
from modicum.federated.deploy.keys import make_certificates, make_node_key
from modicum.federated.deploy.loopback import Loopback
from modicum.federated.deploy.meter import Meter
from modicum.federated.deploy.processes import Processes, pairs, supernode, toml
from modicum.federated.strategy import STATE, read_history


@pytest.mark.slow
def test_two_nodes_agree_with_one_process_and_strangers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(
        rounds=2, clients=2, rule='{"kind": "tinymetafed", "clients": 2}',
        out=str(tmp_path / "out"), timeout=300,
    )  # fmt: skip
    monkeypatch.setenv("MODICUM_TEST", str(tmp_path))
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
        assert len(inheriting(tmp_path)) >= 6  # server and nodes, and what waits for their tasks
        assert "No SuperNode found with the given public key" in fleet.server.said()
        assert "CERTIFICATE_VERIFY_FAILED" in deceived.said()
    assert not inheriting(tmp_path)

    alone = {"out": "", "cache": str(tmp_path / "cache")}
    expected = in_one_process(settings.model_copy(update=alone))
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
    assert names.get_values_for_type(x509.DNSName) == ["pc.local", "localhost"]
    addresses = [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["192.168.1.10", "127.0.0.1"]  # the server's own processes use the latter
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


def test_what_was_started_is_stopped_with_all_that_it_has_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODICUM_TEST", str(tmp_path))
    stubborn = "trap '' TERM; setsid sleep 600 & sleep 600 & echo up; wait"

    def fail_midway() -> None:
        with Processes(os.environ, patience=0.5) as processes:
            started = processes.start(["sh", "-c", stubborn], tmp_path / "log")
            while "up" not in started.said():
                time.sleep(0.05)
            os.kill(started.pid, signal.SIGKILL)  # its children are nobody's now
            assert len(inheriting(tmp_path)) >= 2
            raise ModicumError("midway")

    with pytest.raises(ModicumError, match="midway"):
        fail_midway()
    assert not inheriting(tmp_path)
