#!/bin/sh
# Installs what building and the tests on real kernels need on this machine (Debian 12 or 13), and says what it does.
set -eu

missing=
need() { # program package
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need mmdebstrap mmdebstrap
need qemu-system-x86_64 qemu-system-x86
need xz xz-utils
need tar tar
need cc gcc
need pkg-config pkg-config
# The tests of units and man pages read them with these.
need systemd-analyze systemd
need groff groff-base
[ -e /usr/include/libudev.h ] || missing="$missing libudev-dev"
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
[ -e /usr/share/seabios/bios-256k.bin ] || missing="$missing seabios"
if [ "$(id -u)" != 0 ]; then
    need newuidmap uidmap
fi

if [ -z "$missing" ]; then
    echo "setup: everything is installed"
    exit 0
fi
echo "setup: apt-get install$missing"
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || { echo "setup: run this as root, or install sudo" >&2; exit 1; }
    as_root=sudo
fi
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q
# shellcheck disable=SC2086
$as_root apt-get install -q -y --no-install-recommends $missing
