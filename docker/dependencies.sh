#!/bin/sh
# Installs the pinned packages during an image build: dependencies.sh runtime | demo.
#
# runtime: a venv in /opt/fedqlora with what servers and sites run, without pip.
# demo: on top of it, in /opt/demo, what only the development cluster needs.
# Environment: DEVICE, EXTRAS, OFFLINE, PIP_INDEX_URL, TORCH_INDEX_URL. Files: /requirements,
# /constraints.txt, /constraints.cuda.txt, /wheelhouse, the build secret ca_bundle if there is one.
set -eu
venv=/opt/fedqlora
packages() { echo "$1"/lib/python3.*/site-packages; }

case "$DEVICE" in cpu | cuda) ;; *) echo "DEVICE is $DEVICE: use cpu or cuda" >&2; exit 2 ;; esac
case "${EXTRAS:=}" in "" | he) ;; *) echo "EXTRAS is $EXTRAS: use he or leave it out" >&2; exit 2 ;; esac
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "the base image's python3 is older than 3.11: choose another BASE_IMAGE" >&2; exit 2; }

# pip comes as a wheel that runs from its file: neither it nor ensurepip ends up in the venv.
wheels=/wheelhouse/$DEVICE
find_pip() { find "$wheels" /usr/share/python-wheels -name 'pip-*.whl' 2>/dev/null | head -n 1; }
if [ -z "$(find_pip)" ]; then
    apt-get update -q
    apt-get install -q -y --no-install-recommends python3-pip-whl
fi
install() {
    "$venv/bin/python" "$(find_pip)/pip" install --no-compile --only-binary :all: \
        -c /constraints.txt -c /constraints.cuda.txt "$@"
}

if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS="$wheels"
if [ -z "$PIP_INDEX_URL" ]; then unset PIP_INDEX_URL; fi
if [ -n "$OFFLINE" ]; then
    ls "$wheels"/*.whl >/dev/null 2>&1 ||
        { echo "docker/wheelhouse/$DEVICE holds no wheels: run make wheelhouse DEVICE=$DEVICE" >&2; exit 2; }
    export PIP_NO_INDEX=1
fi

install_torch() {
    # Alone and first, so that its own index serves nothing else.
    install --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        "$(grep '^torch==' /constraints.txt)"
    cuda=$("$venv/bin/python" -c 'import runpy, sys; print(runpy.run_path(sys.argv[1])["cuda"] or "")' \
        "$(packages $venv)/torch/version.py")
    if [ "$DEVICE" = cuda ] && [ -z "$cuda" ]; then
        echo "DEVICE=cuda, but the index gave a CPU build of torch: set TORCH_INDEX_URL" >&2
        exit 2
    fi
    if [ "$DEVICE" = cpu ] && [ -n "$cuda" ]; then
        echo "NOTE: the index gave a CUDA build of torch, which works on a CPU but makes the" \
            "image three times as large: set TORCH_INDEX_URL to an index of CPU builds" >&2
    fi
}

# What no running process opens: headers, tests, code generators, other devices' libraries.
drop_unused() {
    site=$(packages $venv)
    (cd "$site" && rm -rf torch/include torch/test torch/share torch/bin/protoc* torch/bin/test_* \
        pyarrow/include pyarrow/src pyarrow/*flight*)
    find "$site" -type d -name tests -prune -exec rm -rf {} +
    find "$site" -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.pxi' \
        -o -name '*.a' \) -delete
    keep=libbitsandbytes_${cuda:+cuda$(echo "$cuda" | tr -d .)}
    find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name libbitsandbytes_cpu.so \
        ! -name "$keep.so" -delete
    # Flower calls uv only to install packages at run time, which nothing here may do.
    rm -f "$venv"/bin/uv "$venv"/bin/uvx "$venv"/bin/[Aa]ctivate*
    # Nothing links these: several GPUs in one solver, older drivers' compiler, profilers.
    (cd "$site" && rm -rf nvidia/cu13/include && cd nvidia/cu13/lib 2>/dev/null && rm -f \
        libcusolverMg* libnvrtc*.alt.* libnvperf* libnvblas* libcufftw* libcheckpoint* \
        libpcsampling*) || true
    # torch names setuptools for its compiler extensions alone. With Triton, torch 2.13 replaces
    # the product inside rotary embeddings on a GPU by a kernel that needs a C compiler at run
    # time; without it, cuBLAS does the same work, and the image is 600 MB smaller.
    "$venv/bin/python" "$(find_pip)/pip" uninstall -q -y setuptools triton
}

# Without bytecode every start on the read-only root would compile all that it imports anew.
# The file left out is written for a newer Python.
compile() { "$venv/bin/python" -m compileall -q -j 0 -x py312_intrinsics "$1"; }

case "$1" in
runtime)
    python3 -m venv --without-pip "$venv"
    install_torch
    install -r /requirements/runtime.txt
    if [ -n "$EXTRAS" ]; then install -r "/requirements/$EXTRAS.txt"; fi
    drop_unused
    compile "$(packages $venv)" ;;
demo)
    install --prefix /opt/demo -r /requirements/demo.txt
    install --prefix /opt/demo --no-deps -r /requirements/bare.txt
    compile "$(packages /opt/demo)" ;;
esac
