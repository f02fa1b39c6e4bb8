"""Rollover of the authority: who connects to whom at each stage, and who does no longer."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certs.__main__ import main
from certs.crl import list_revoked, read_lists
from certs.files import CertificateError, MisuseError, read_certificates
from certs.handshake import serve_serial
from certs.inspection import inspect_all
from certs.renewal import format_serial
from certs.revocation import revoke
from certs.rollover import STAGES, roll_over
from certs.rotation import rotate
from certs.site import make_all
from fedqlora.tls import load_identity
from tests.certs.peers import assert_refused, call_as_site, superlink

PASSPHRASE = b"correct horse battery"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The federation before a rollover and after each of its stages; read only."""
    folder = tmp_path_factory.mktemp("stages")
    out = folder / "before"
    make_all(out, ["a", "b"])
    copies = {"before": out}
    for stage in STAGES:
        copies[stage] = Path(shutil.copytree(out, folder / stage, symlinks=True))
        out = copies[stage]
        assert roll_over(out).name == stage
    return copies


def _subjects(path: Path) -> list[str]:
    return [one.subject.rfc4514_string() for one in read_certificates(path)]


def _assert_whole(out: Path) -> None:
    report = inspect_all(out)
    assert (report.problems, report.warnings) == ([], [])
    load_identity(out / "superlink", "server")
    for site in ("a", "b"):
        load_identity(out / "sites" / site, "client")


@pytest.mark.parametrize("stage", STAGES)
def test_after_each_stage_all_is_whole_and_sites_connect(
    stages: Mapping[str, Path], stage: str
) -> None:
    _assert_whole(stages[stage])
    with superlink(stages[stage]) as port:
        for site in ("a", "b"):
            seen = call_as_site(port, stages[stage], site)
            assert seen["peer_uri"] == f"urn:fedqlora:site:{site}"


@pytest.mark.parametrize("stage", ["trust", "switch"])
def test_a_site_that_knows_only_the_old_root_connects_until_it_is_retired(
    stages: Mapping[str, Path], stage: str
) -> None:
    # Its whole folder is the old one: root, leaf and key.
    assert _subjects(stages["before"] / "sites/a/current/ca.crt") == ["CN=fedqlora root"]
    with superlink(stages[stage]) as port:
        assert call_as_site(port, stages["before"], "a")["peer_uri"] == "urn:fedqlora:site:a"
        # The launchers try OpenSSL before gRPC, which has a TLS library of its own.
        client = stages["before"] / "sites" / "a" / "current"
        leaf = read_certificates(stages[stage] / "superlink" / "current" / "server.crt")[0]
        served = serve_serial(("localhost", port), client / "ca.crt", client)
        assert served == format_serial(leaf)


def test_a_site_that_knows_only_the_old_root_is_cut_off_by_retiring(
    stages: Mapping[str, Path],
) -> None:
    with superlink(stages["retire"]) as port:
        assert_refused(
            lambda: call_as_site(port, stages["before"], "a"), "CERTIFICATE_VERIFY_FAILED"
        )
        # With the bundle of the stage `trust` it knows the server, which does not know it.
        assert_refused(lambda: call_as_site(port, stages["trust"], "a"))
        assert call_as_site(port, stages["retire"], "a")


def test_without_the_cross_signature_the_old_root_would_not_lead_to_the_new_server(
    stages: Mapping[str, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(stages["switch"], tmp_path / "out", symlinks=True)
    chain = out / "superlink" / "current" / "server.crt"
    pems = chain.read_bytes().split(b"-----BEGIN")
    assert len(pems) == 4
    chain.write_bytes(b"-----BEGIN".join(pems[:3]))
    with superlink(out) as port:
        assert call_as_site(port, stages["trust"], "a")
        assert_refused(lambda: call_as_site(port, stages["before"], "a"))


@pytest.mark.parametrize(("stage", "ahead"), [("trust", "switch"), ("switch", "retire")])
def test_a_site_that_is_a_stage_ahead_of_the_superlink_connects(
    stages: Mapping[str, Path], stage: str, ahead: str
) -> None:
    with superlink(stages[stage]) as port:
        assert call_as_site(port, stages[ahead], "b")


def test_bundles_hold_old_and_new_until_the_old_is_retired(stages: Mapping[str, Path]) -> None:
    roots, authorities = ["CN=fedqlora root"], ["CN=fedqlora sites authority"]
    new_roots, new_authorities = ["CN=fedqlora root 2"], ["CN=fedqlora sites authority 2"]
    expected = {
        "before": (roots, authorities),
        "trust": (roots + new_roots, authorities + new_authorities),
        "switch": (roots + new_roots, authorities + new_authorities),
        "retire": (new_roots, new_authorities),
    }
    for stage, (known, accepted) in expected.items():
        centre = stages[stage] / "superlink" / "current"
        assert _subjects(centre / "root.crt") == known
        assert _subjects(centre / "ca.crt") == accepted
        assert _subjects(stages[stage] / "sites" / "b" / "current" / "ca.crt") == known
        lists = read_lists(centre / "crl.pem", read_certificates(centre / "ca.crt"))
        assert [f"{one.issuer.rfc4514_string()}" for one in lists] == accepted
    assert {path.name for path in stages["retire"].iterdir()} == {
        "authority", "superlink", "coordinator", "evaluator", "sites",
    }  # fmt: skip
    assert "cross.crt" not in {path.name for path in (stages["retire"] / "authority").iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_everything_else_works_between_stages(
    stages: Mapping[str, Path], stage: str, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(stages[stage], tmp_path / "out", symlinks=True))
    (out / "authority" / "ca.key").unlink()
    assert make_all(out, ["a", "b"]) == []
    make_all(out, ["c"])
    rotate(out)
    revoke(out, "c")
    _assert_whole(out)
    with superlink(out) as port:
        assert call_as_site(port, out, "b")
        if stage != "retire":
            assert call_as_site(port, stages["before"], "b")
    if stage == "retire":
        return
    for following in STAGES[STAGES.index(stage) + 1 :]:
        (out / "authority-next" / "ca.key").unlink(missing_ok=True)
        assert roll_over(out).name == following
        _assert_whole(out)
    centre = out / "superlink" / "current"
    lists = read_lists(centre / "crl.pem", read_certificates(centre / "ca.crt"))
    leaf = read_certificates(out / "sites" / "c" / "current" / "client.crt")[0]
    assert leaf.serial_number in list_revoked(lists)


def test_a_second_rollover_follows_the_first(stages: Mapping[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(stages["retire"], tmp_path / "out", symlinks=True))
    assert [roll_over(out).name for _ in STAGES] == list(STAGES)
    assert _subjects(out / "superlink" / "current" / "root.crt") == ["CN=fedqlora root 3"]
    _assert_whole(out)
    with superlink(out) as port:
        assert call_as_site(port, out, "a")


@pytest.mark.parametrize("behind", ["before", "trust"])
def test_retiring_is_refused_until_every_site_has_moved(
    stages: Mapping[str, Path], tmp_path: Path, behind: str
) -> None:
    out = Path(shutil.copytree(stages["switch"], tmp_path / "out", symlinks=True))
    shutil.rmtree(out / "sites" / "b")
    shutil.copytree(stages[behind] / "sites" / "b", out / "sites" / "b", symlinks=True)
    with pytest.raises(CertificateError, match="Site b does not trust the new root"):
        roll_over(out)
    assert (out / "authority-next").exists()
    assert main(["rollover", "--out", str(out), "--force"]) == 0
    assert not (out / "authority-next").exists()
    _assert_whole(out)
    with superlink(out) as port:
        assert call_as_site(port, out, "b")


def test_the_first_stage_needs_the_root_key_and_writes_nothing_without_it(damaged: Path) -> None:
    (damaged / "authority" / "ca.key").rename(damaged.parent / "ca.key")
    with pytest.raises(CertificateError, match="bring the root's key back"):
        roll_over(damaged)
    assert not (damaged / "authority-next").exists()
    (damaged.parent / "ca.key").write_bytes((damaged / "authority" / "sites.key").read_bytes())
    (damaged.parent / "ca.key").rename(damaged / "authority" / "ca.key")
    with pytest.raises(CertificateError, match="is not the key of"):
        roll_over(damaged)
    assert not (damaged / "authority-next").exists()


def test_a_passphrase_opens_the_old_root_and_closes_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, right, wrong, short = (tmp_path / name for name in ("out", "right", "wrong", "short"))
    right.write_bytes(PASSPHRASE + b"\n")
    wrong.write_bytes(b"another passphrase")
    short.write_bytes(b"short\n")
    make = ["make", "--out", str(out), "--sites", "a,b"]
    assert main(make) == 2
    assert "The root's key needs a passphrase" in capsys.readouterr().err
    assert main([*make, "--root-passphrase-file", str(short)]) == 2
    assert not out.exists()
    assert main([*make, "--root-passphrase-file", str(right)]) == 0
    assert main(make) == 0
    rollover = ["rollover", "--out", str(out)]
    for options in ([], ["--root-passphrase-file", str(wrong)]):
        assert main([*rollover, *options]) == 2
        assert "ca.key" in capsys.readouterr().err
        assert not (out / "authority-next").exists()
    assert main([*rollover, "--root-passphrase-file", str(right)]) == 0
    for folder in ("authority", "authority-next"):
        pem = (out / folder / "ca.key").read_bytes()
        with pytest.raises(TypeError):
            load_pem_private_key(pem, None)
        load_pem_private_key(pem, PASSPHRASE)
    assert main(rollover) == 0
    assert main(rollover) == 0
    _assert_whole(out)
    with pytest.raises(MisuseError, match="has a passphrase"):
        roll_over(out)


def test_the_cross_signature_ends_with_the_old_root(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    make_all(tmp_path, ["a"], now=now - datetime.timedelta(days=3000))
    # Issuing authorities and leaves of then have ended; only the roots matter here.
    roll_over(tmp_path, now=now)
    cross = read_certificates(tmp_path / "authority-next" / "cross.crt")[0]
    old = read_certificates(tmp_path / "authority" / "ca.crt")[0]
    assert cross.not_valid_after_utc == old.not_valid_after_utc


def test_the_command_names_the_stage_and_what_comes_next(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with superlink(damaged, follow=True) as port:
        command = ["rollover", "--out", str(damaged), "--connect", f"localhost:{port}"]
        for stage in STAGES:
            assert main(command) == 0
            printed = capsys.readouterr().out.splitlines()
            assert printed[0] == f"stage done: {stage}"
            assert any(line.startswith("next: ") for line in printed)
            assert printed[-1].startswith(f"live: localhost:{port} serves serial ")
