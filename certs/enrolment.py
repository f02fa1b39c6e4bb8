"""The commands of enrolment: request and accept at the site, sign at the coordinator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from certs.acceptance import accept_reply
from certs.application import make_request, renew_request
from certs.files import CertificateError, MisuseError
from certs.fingerprint import equals
from certs.outcome import AddCommand, Outcome
from certs.request import Request
from certs.signing import sign_request


def add_commands(add: AddCommand) -> None:
    """Add the three commands to the command line."""
    request = add("request", _request, "at a site: make its keys and a request to be admitted")
    request.add_argument("--site", required=True, help="its name, as the coordinator gave it")
    request.add_argument("--trust", type=Path, help="folder with root.crt and coordinator.pub")
    request.add_argument(
        "--renew", action="store_true", help="a new TLS key, for a site that was admitted before"
    )
    sign = add("sign", _sign, "at the coordinator: admit or renew a site by its request")
    sign.add_argument("--request", required=True, type=Path, help="the bundle that the site sent")
    sign.add_argument("--fingerprint", help="what the site reads out; asked for if missing")
    accept = add("accept", _accept, "at a site: check the coordinator's reply and put it in use")
    accept.add_argument("--reply", required=True, type=Path, help="the bundle that came back")


def _request(options: argparse.Namespace) -> Outcome:
    if options.renew:
        if options.trust is not None:
            raise MisuseError(
                "A renewal trusts what the site trusts already; leave out either --trust or "
                "--renew."
            )
        made = renew_request(options.out, options.site)
    elif options.trust is None:
        raise MisuseError("Name the folder with root.crt and coordinator.pub with --trust.")
    else:
        made = make_request(options.out, options.site, options.trust)
    fingerprint = made.request.fingerprint
    done = "made" if made.anew else "nothing to do, made before"
    lines = [
        f"site {options.site}: {done}",
        f"request: {made.path}",
        f"fingerprint: {fingerprint}",
        "next: send the request to the coordinator, and compare the fingerprint by telephone",
    ]
    content = {
        "site": options.site,
        "request": str(made.path),
        "fingerprint": fingerprint,
        "anew": made.anew,
    }
    return Outcome(lines, content)


def _sign(options: argparse.Namespace) -> Outcome:
    def confirm(request: Request) -> None:
        if options.fingerprint is not None:
            if not equals(request.fingerprint, options.fingerprint):
                raise CertificateError(
                    f"{options.request} has the fingerprint {request.fingerprint} and not "
                    f"{options.fingerprint}; ask the site to read out its own again."
                )
        elif not request.renews:
            _ask(request)

    signed = sign_request(options.out, options.request, confirm)
    done = "signed" if signed.anew else "nothing to do, signed before"
    register = "" if signed.renewal else "register the site (`python -m server enrol`), and "
    lines = [
        f"site {signed.site}: {done}, serial {signed.serial}, until {signed.until}",
        f"fingerprint: {signed.fingerprint}",
        f"reply: {signed.reply}",
        f"next: give the SuperLink its new folder, {register}send the site the reply",
    ]
    content = {
        "site": signed.site,
        "fingerprint": signed.fingerprint,
        "reply": str(signed.reply),
        "serial": signed.serial,
        "until": signed.until,
        "renewal": signed.renewal,
        "anew": signed.anew,
    }
    return Outcome(lines, content)


def _ask(request: Request) -> None:
    """Have a person at a terminal compare the fingerprint."""
    if not sys.stdin.isatty():
        raise MisuseError(
            f"The request of site {request.site} has the fingerprint {request.fingerprint}; "
            "compare it with the site's, and say --fingerprint."
        )
    sys.stderr.write(
        f"site: {request.site}\nfingerprint: {request.fingerprint}\n"
        "Does the site read out the same one? Type yes: "
    )
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() != "yes":
        raise CertificateError("The fingerprint was not confirmed; nothing was signed.")


def _accept(options: argparse.Namespace) -> Outcome:
    accepted = accept_reply(options.out, options.reply)
    done = "accepted" if accepted.anew else "nothing to do, accepted before"
    lines = [
        f"site {accepted.site}: {done}, until {accepted.until}",
        f"FEDQLORA_KEYS_SUPERNODE={accepted.supernode}",
        f"FEDQLORA_KEYS_TRAINER={accepted.trainer}",
    ]
    if accepted.peers:
        lines += ["peers, for policy.toml once compared by telephone with each of them:", "[peers]"]
        lines += [f'{name} = "{fingerprint}"' for name, fingerprint in accepted.peers.items()]
    else:
        lines.append("peers: none yet")
    content = {
        "site": accepted.site,
        "supernode": str(accepted.supernode),
        "trainer": str(accepted.trainer),
        "until": accepted.until,
        "peers": dict(accepted.peers),
        "anew": accepted.anew,
    }
    return Outcome(lines, content)
