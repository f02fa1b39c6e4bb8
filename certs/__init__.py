"""Keys and certificates of every party of a federation; imports nothing else of ours.

Trust in one picture (who signs whom; validity in brackets):

    root, P-384 [10 years]                   authority/ca.crt
    ├── server authority, P-256 [3 years]    may only sign servers
    │   └── SuperLink [90 days]              superlink/current/server.crt
    └── sites authority, P-256 [3 years]     may only sign clients
        └── one per site [90 days]           sites/<name>/current/client.crt

Each side is given exactly what it has to trust, under one name, `ca.crt`: a site's holds the
root, so that a new server authority needs no change at any site; the SuperLink's holds the
sites authority alone, so that no other certificate below the root is a client. gRPC accepts
an issuing authority as an anchor, and refuses a certificate that an authority of the other
kind has signed (both are tested with real handshakes).

The keys of development sites are made here. A hospital makes its own (`certs.application`), and
`sites/<name>/` then holds its request in their place; its reply lies in `replies/`.

Nothing is replaced where it lies. A rotation, a revocation or a stage of a rollover writes new
versions of all folders that it changes, hidden, and then puts them in use together
(`certs.change`); an interruption leaves everybody with the old or the new ones. What the SuperLink
accepts changes first: its folder also holds the roster and the revocation list, `crl.pem`.
"""
