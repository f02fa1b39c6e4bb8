#!/bin/sh
# Fills docker/wheelhouse/DEVICE: wheelhouse.sh cpu | cuda, called by `make wheelhouse`.
#
# Wheels of the pinned packages of all images for Python 3.11 on Linux and this machine's
# architecture, and pip itself, so that an image build needs no package index. pip takes its
# settings (index, certificates, proxy) from where it always does; TORCH_INDEX_URL as in a build.
set -eu
device=$1
python=${PYTHON:-python3}
case "$device" in cpu | cuda) ;; *) echo "DEVICE is $device: use cpu or cuda" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
[ "$(uname -s)" = Linux ] ||
    { echo "make wheelhouse needs Linux: packages are chosen for the system that it runs on" >&2; exit 2; }
"$python" -m pip --version >/dev/null 2>&1 || { echo "$python has no pip: set PYTHON=..." >&2; exit 2; }

wheels=docker/wheelhouse/$device
new=docker/wheelhouse/$device.new
rm -rf "$new"
trap 'rm -rf "$new"' EXIT
mkdir -p "$new"
"$python" docker/requirements.py pyproject.toml "$new"

platforms=$(for minor in $(seq 17 36); do echo "--platform manylinux_2_${minor}_$(uname -m)"; done)
download() {
    # shellcheck disable=SC2086 # one word per option
    "$python" -m pip download -qq -d "$new" --only-binary :all: --implementation cp \
        --python-version 3.11 --abi cp311 --abi abi3 --abi none \
        $platforms --platform "manylinux2014_$(uname -m)" --platform "linux_$(uname -m)" "$@"
}
download --no-deps pip
download --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' constraints.txt)"
download -c constraints.txt -c docker/constraints.cuda.txt "$new"/torch-*.whl -r "$new/runtime.txt" -r "$new/demo.txt" \
    ${EXTRAS:+-r "$new/$EXTRAS.txt"}
download -c constraints.txt -c docker/constraints.cuda.txt --no-deps -r "$new/bare.txt"
rm "$new"/*.txt
if [ "$device" = cuda ] && ! ls "$new"/nvidia_*.whl >/dev/null 2>&1; then
    echo "DEVICE=cuda, but pip found a CPU build of torch: set TORCH_INDEX_URL or take" \
        "find-links out of pip's settings" >&2
    exit 2
fi
rm -rf "$wheels"
mv "$new" "$wheels"
echo "$wheels: $(find "$wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$wheels" | cut -f 1)"
