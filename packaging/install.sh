#!/bin/sh
# Installs what `cargo build --release` made, and the files of this directory:
#
#   packaging/install.sh            onto this machine, below /usr
#   DESTDIR=/tmp/x packaging/install.sh     into a directory, for a package
#
# TARGET is cargo's target directory, PROGRAMS the directory in it with the programs, if not release/. They are
# installed stripped where `strip` is.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
destination=${DESTDIR:-}
target=${PROGRAMS:-${TARGET:-${CARGO_TARGET_DIR:-$here/../target}}/release}

for program in usbpolicyd usbpolicyd-sysfs usbpolicyctl usbvfiod; do
    if [ ! -x "$target/$program" ]; then
        echo "install.sh: $target/$program is missing; run: cargo build --release --locked" >&2
        exit 1
    fi
done
if [ ! -x "$target/packaging" ]; then
    echo "install.sh: $target/packaging (writes man pages and completions) is missing; run: cargo build --release --locked" >&2
    exit 1
fi

put() { # mode source directory
    install -D -m "$1" "$2" "$destination$3/$(basename "$2")"
}

for program in usbpolicyd usbpolicyd-sysfs usbpolicyctl usbvfiod; do
    put 755 "$target/$program" /usr/bin
    if command -v strip >/dev/null; then
        strip --strip-unneeded "$destination/usr/bin/$program"
    fi
done
for unit in "$here"/systemd/*; do
    put 644 "$unit" /usr/lib/systemd/system
done
put 644 "$here/sysusers.d/usbpolicyd.conf" /usr/lib/sysusers.d
put 644 "$here/tmpfiles.d/usbpolicyd.conf" /usr/lib/tmpfiles.d
put 644 "$here/udev/70-usbpolicyd.rules" /usr/lib/udev/rules.d
put 644 "$here/../docs/user/policy.schema.json" /usr/share/usbpolicyd
put 644 "$here/vfio-user/50-usbvfiod.json" /usr/share/vfio-user
made=$(mktemp -d)
trap 'rm -r "$made"' EXIT
"$target/packaging" "$made"
for page in "$made"/man/*; do
    section=${page##*.}
    put 644 "$page" "/usr/share/man/man$section"
    gzip -9nf "$destination/usr/share/man/man$section/$(basename "$page")"
done
for file in "$made"/bash/*.bash; do
    install -D -m 644 "$file" "$destination/usr/share/bash-completion/completions/$(basename "$file" .bash)"
done
for file in "$made"/zsh/*; do
    put 644 "$file" /usr/share/zsh/vendor-completions
done
for file in "$made"/fish/*; do
    put 644 "$file" /usr/share/fish/vendor_completions.d
done
install -d -m 755 "$destination/etc/usbpolicyd/policy.d" "$destination/usr/lib/usbpolicyd/policy.d"

if [ -z "$destination" ] && [ -d /run/systemd/system ]; then
    systemd-sysusers usbpolicyd.conf
    systemd-tmpfiles --create usbpolicyd.conf
    systemctl daemon-reload
    udevadm control --reload
    udevadm trigger --subsystem-match=usb --attr-match=busnum --action=change
    echo "Installed. Write /etc/usbpolicyd/policy.toml, then: systemctl enable --now usbpolicyd"
fi
