# Second part of the start of the host under test: from its own root file system until the agent takes over.
export PATH=/stage/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 NO_COLOR=1
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t configfs configfs /sys/kernel/config 2>/dev/null
mount -t debugfs debugfs /sys/kernel/debug
echo host > /proc/sys/kernel/hostname
ip link set lo up
/usr/lib/systemd/systemd-udevd --daemon
modprobe -a kvm_amd kvm_intel 2>/dev/null
modprobe -a xhci_pci ehci_pci uhci_hcd
udevadm trigger --action=add --subsystem-match=usb --subsystem-match=block --subsystem-match=misc
udevadm settle
cd /root || exit
exec /stage/bin/vm-agent init
