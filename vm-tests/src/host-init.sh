#!/bin/busybox sh
# First process of the host under test, from its initramfs: read-only root over 9p, a writable layer in memory on top.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do $bb insmod "/lib/modules/$module"; done < /load-order
share="trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro"
$bb mkdir -p /image /layer /root
$bb mount -t 9p -o "$share" image /image
$bb mount -t tmpfs -o size=75% layer /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/image,upperdir=/layer/upper,workdir=/layer/work overlay /root
$bb mount -t 9p -o "$share" stage /root/stage
for place in proc sys dev; do $bb mount --move /$place /root/$place; done
exec $bb switch_root /root /bin/sh /stage/host-start.sh
