#!/bin/sh
# Builds the Debian package from what `cargo build --release` made, with dpkg-deb alone and without any network:
#
#   packaging/deb/build.sh OUTPUT_DIRECTORY
set -eu
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT_DIRECTORY}
root=$(mktemp -d)
trap 'rm -r "$root"' EXIT
mkdir -p "$output" "$root/tree/DEBIAN"
chmod 755 "$root/tree"

DESTDIR=$root/tree "$here/../install.sh"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -1)
documents=$root/tree/usr/share/doc/usbpolicyd
install -D -m 644 "$here/copyright" "$documents/copyright"
install -m 644 "$here/../../CHANGELOG.md" "$documents/CHANGELOG.md"
gzip -9n "$documents/CHANGELOG.md"
if [ -d "$here/../../docs/user" ]; then
    cp -r "$here/../../docs/user" "$documents/"
fi
for policy in "$here"/../../policies/*.toml; do
    if [ -e "$policy" ]; then
        install -D -m 644 "$policy" "$documents/examples/$(basename "$policy")"
    fi
done

# Shared libraries: asked of dpkg where its tool is, else what the programs are known to link.
depends="libc6, libgcc-s1, libudev1"
if command -v dpkg-shlibdeps >/dev/null; then
    mkdir -p "$root/debian"
    printf 'Source: usbpolicyd\n\nPackage: usbpolicyd\nArchitecture: any\n' >"$root/debian/control"
    found=$(cd "$root" && dpkg-shlibdeps -O --ignore-missing-info tree/usr/bin/* 2>/dev/null |
        sed -n 's/^shlibs:Depends=//p')
    depends=${found:-$depends}
fi

size=$(du -sk --exclude=DEBIAN "$root/tree" | cut -f1)
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$(dpkg --print-architecture)/" \
    -e "s/@DEPENDS@/$depends/" -e "s/@SIZE@/$size/" "$here/control.in" >"$root/tree/DEBIAN/control"
for script in postinst prerm postrm; do
    install -m 755 "$here/$script" "$root/tree/DEBIAN/$script"
done
(cd "$root/tree" && find usr -type f -exec md5sum {} +) >"$root/tree/DEBIAN/md5sums"
find "$root/tree" -type d -exec chmod 755 {} +

dpkg-deb --build --root-owner-group "$root/tree" "$output"
