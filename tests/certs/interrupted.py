"""Carries a command out again and again, each time interrupted at one write more.

    python -m tests.certs.interrupted COMMAND kill|fail|mixed FOLDER

`kill` ends the process at that write, `fail` makes the write fail as a full disk does, `mixed` does
now this and now that, in half the time of both. After each
interruption everybody must still get along, and the next call must bring the command to its end.
A process of its own: it forks, which the threads of gRPC do not take well.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from certs.acceptance import accept_reply
from certs.application import renew_request
from certs.chain import accept_client, accept_server, fits
from certs.change import CHANGE_FILE
from certs.files import (
    CertificateError,
    read_certificates,
    read_signing_key,
    read_supernode_key,
    read_tls_key,
)
from certs.inspection import inspect_all
from certs.parties import is_enrolled, list_sites, read_site_keys
from certs.revocation import revoke
from certs.rollover import STAGES, read_stage, roll_over
from certs.roster import encode_tls, read_roster
from certs.rotation import rotate
from certs.signing import sign_request
from certs.site import make_all
from tests.certs.sites import apply, confirm, enrol

SITES = ("a", "b")
ENROLMENT = ("sign", "sign-renewal", "accept", "accept-renewal")
# The enrolled site's own folder, beside the parties' so that one copy is a whole state.
HOME = "home"
_WRITES = {"os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
_UNREACHED, _FAILED, _KILLED = 40, 41, 42


def prepare(command: str, out: Path) -> None:
    """Make what the command starts from."""
    if command != "make":
        make_all(out, SITES)
        rotate(out, ["a"])
    if command in ("sign", "accept"):
        apply(out, out / HOME)
    elif command in ENROLMENT:
        enrol(out, out / HOME)
        renew_request(out / HOME, "h")
    if command.startswith("accept"):
        sign_request(out, out / HOME / "h.request.tar", confirm)
    if command in STAGES:
        for _ in STAGES[: STAGES.index(command)]:
            roll_over(out)


def carry_out(command: str, out: Path) -> object:
    """Run the command once."""
    if command == "make":
        return make_all(out, SITES)
    if command == "admit":
        return make_all(out, [*SITES, "c"])
    if command == "rotate":
        return rotate(out)
    if command == "revoke":
        return revoke(out, "b")
    if command.startswith("sign"):
        return sign_request(out, out / HOME / "h.request.tar", confirm)
    if command.startswith("accept"):
        return accept_reply(out / HOME, out / "replies" / "h.reply.tar")
    # What is complete is not begun again here: that would be the next stage.
    if read_stage(out) != command and not (out / CHANGE_FILE).exists():
        return None
    return roll_over(out).name


def interrupt(act: Callable[[], object], number: int, mode: str) -> int:
    """Run something in a child that is interrupted at its `number`-th write; returns its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        flags = arguments[2] if event == "open" else 0
        if event in _WRITES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            count += 1
            if count == number:
                if mode == "kill":
                    os._exit(_KILLED)
                raise OSError(errno.ENOSPC, "No space left on device")

    status = _FAILED
    try:
        sys.addaudithook(look)
        act()
        status = _UNREACHED if count < number else 0
    except CertificateError:
        pass
    finally:
        os._exit(status)


def check_meanwhile(out: Path) -> None:
    """Everybody reads one whole version, and both sides accept each other."""
    centre = out / "superlink" / "current"
    chain = read_certificates(centre / "server.crt")
    moment = max(one.not_valid_before_utc for one in chain)
    assert fits(read_tls_key(centre / "server.key"), chain[0])
    coordinator = read_signing_key(out / "coordinator" / "signing.key").public_key()
    roster = read_roster(centre, coordinator)
    assert (centre / "crl.pem").read_bytes().endswith(b"-----END X509 CRL-----\n")
    for site in list_sites(out):
        folder = out / "sites" / site / "current"
        if is_enrolled(folder):
            assert read_site_keys(folder).tls[0] in roster.sites[site].tls
            folder = out / HOME / "supernode" / "current"
            signing = out / HOME / "trainer" / "current" / "signing.key"
            if not folder.exists():
                continue
        else:
            signing = folder / "signing.key"
        client = read_certificates(folder / "client.crt")
        moment = max(moment, client[0].not_valid_before_utc)
        key = read_tls_key(folder / "client.key")
        read_supernode_key(folder / "supernode.key")
        read_signing_key(signing)
        assert fits(key, client[0])
        assert accept_server(chain, read_certificates(folder / "ca.crt"), moment), site
        assert accept_client(client, read_certificates(centre / "ca.crt"), site, moment), site
        if site in roster.sites:
            assert encode_tls(key.public_key()) in roster.sites[site].tls, site


def check_afterwards(command: str, out: Path, before: dict[str, int]) -> None:
    """The command has reached its end, once, and has left nothing lying about."""
    report = inspect_all(out)
    assert report.problems == [], report.problems
    assert not list(out.rglob(".*")), list(out.rglob(".*"))
    after = serials(out)
    assert set(after) == {
        "make": {"superlink", "a", "b"},
        "admit": {"superlink", "a", "b", "c"},
        "revoke": {"superlink", "a"},
        **{one: {"superlink", "a", "b", "h"} for one in ENROLMENT},
    }.get(command, {"superlink", "a", "b"})
    if command in ("rotate", "switch"):
        assert not set(after.values()) & set(before.values())
    elif command in ("trust", "retire"):
        assert after == before
    if command in STAGES:
        following = {"trust": "switch", "switch": "retire", "retire": "trust"}[command]
        assert read_stage(out) == following
    if command.startswith("accept"):
        held = {one.name for one in (out / HOME).iterdir()}
        assert held == {"h.request.tar", "supernode", "trainer"}, held
        own = read_certificates(out / HOME / "supernode" / "current" / "client.crt")
        assert own[0].serial_number == after["h"]
        assert not accept_reply(out / HOME, out / "replies" / "h.reply.tar").anew
    check_meanwhile(out)


def serials(out: Path) -> dict[str, int]:
    """The serial number of everybody's present leaf."""
    leaves = {site: out / "sites" / site / "current" / "client.crt" for site in list_sites(out)}
    if (out / "superlink").exists():
        leaves["superlink"] = out / "superlink" / "current" / "server.crt"
    return {name: read_certificates(path)[0].serial_number for name, path in leaves.items()}


def main(command: str, chosen: str, folder: Path) -> int:
    """Interrupt a command at each of its writes; returns how many there were."""
    source = folder / "source"
    prepare(command, source)
    number = 0
    while True:
        number += 1
        out = folder / str(number)
        if source.exists():
            shutil.copytree(source, out, symlinks=True)
        before = serials(out)
        mode = {"mixed": "fail" if number % 3 == 0 else "kill"}.get(chosen, chosen)
        status = interrupt(lambda out=out: carry_out(command, out), number, mode)  # type: ignore[misc]
        if status == _UNREACHED:
            check_afterwards(command, out, before)
            return number - 1
        assert status in (0, _FAILED) if mode == "fail" else status == _KILLED, status
        if command != "make":
            check_meanwhile(out)
        carry_out(command, out)
        check_afterwards(command, out, before)
        shutil.rmtree(out)


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))}\n")
