#!/bin/sh
# Put what runs aarch64 programs on this processor into a folder: Debian's user-mode emulator and Python, and the
# ONNX Runtime of this environment as it is for arm64. Nothing is installed, and root is not needed.
#
#   prepare.sh FOLDER PYTHON      PYTHON has onnxruntime, numpy and pip; the machine has apt-get and its sources
set -eu
root=$(mkdir -p "$1" && cd "$1" && pwd)
python=$2
[ -f "$root/ready" ] && exit 0

get() { # get ARCHITECTURE WORD...: apt-get with a state of its own
    architecture=$1
    shift
    state=$root/apt-$architecture
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    touch "$state/status"
    apt-get -q -o APT::Architecture="$architecture" -o APT::Architectures::="$architecture" -o Debug::NoLocking=1 \
        -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state" \
        -o APT::Sandbox::User="$(id -un)" "$@"
}
native=$(dpkg --print-architecture)
get "$native" update
(cd "$root" && get "$native" download qemu-user-static)
get arm64 update
get arm64 install --download-only --yes --no-install-recommends python3 libstdc++6

mkdir -p "$root/guest"
dpkg-deb --fsys-tarfile "$root"/qemu-user-static_*.deb | tar -x -O ./usr/bin/qemu-aarch64-static >"$root/qemu"
chmod +x "$root/qemu"
for package in "$root"/apt-arm64/archives/*.deb; do
    dpkg-deb -x "$package" "$root/guest"
done
rm -r "$root"/apt-* "$root"/qemu-user-static_*.deb

version=$(readlink "$root/guest/usr/bin/python3" | sed 's/python//')
packages=$("$python" -c 'import numpy, onnxruntime as o; print(f"numpy=={numpy.__version__} onnxruntime=={o.__version__}")')
# shellcheck disable=SC2086
"$python" -m pip install --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    --target "$root/guest/site" $packages

# ONNX Runtime asks Linux which processor this is; the emulator does not answer for an Arm one.
mkdir -p "$root/guest/proc"
for number in 0 1; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd asimdhp asimdrdm lrcpc dcpop asimddp atomics\n' $number
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n'
done >"$root/guest/proc/cpuinfo"
touch "$root/ready"
