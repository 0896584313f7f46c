//! The kernel's usbfs interface: one safe function per ioctl of `linux/usbdevice_fs.h` that we use.
