//! Plugging a device into a port of `vhci_hcd` (kernel `drivers/usb/usbip/vhci_sysfs.c`).

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::descriptors::Speed;

/// Where the kernel module shows itself.
pub const CONTROLLER: &str = "/sys/devices/platform/vhci_hcd.0";

/// `VDEV_ST_NULL`: nothing is plugged in.
const FREE: &str = "004";

/// A port with a device in it; dropping the socket pulls it.
#[derive(Debug)]
pub struct Plugged {
    /// Our end of the connection.
    pub socket: UnixStream,
    /// Number of the port, counted over both root hubs.
    pub port: u32,
}

/// Plugs a device of this speed into the first free port that takes it.
pub fn plug(speed: Speed) -> Result<Plugged> {
    let controller = Path::new(CONTROLLER);
    let status = read_status(controller)?;
    let ports = free_ports(&status, speed);
    let (ours, kernels) = UnixStream::pair().context("socket pair")?;
    for port in ports {
        // Any number will do for a device id, but only one of a kind is readable in a trace.
        let device_id = 0x1_0000 + port;
        let line = format!("{port} {} {device_id} {}", kernels.as_raw_fd(), speed as u32);
        match fs::write(controller.join("attach"), &line) {
            Ok(()) => return Ok(Plugged { socket: ours, port }),
            // Somebody else was faster.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(error).with_context(|| format!("attach {line}")),
        }
    }
    bail!("no free {speed:?} port of vhci_hcd")
}

/// The name of the device in a port below `/sys/bus/usb/devices`, once the kernel has addressed it.
pub fn bus_id(port: u32) -> Option<String> {
    let status = read_status(Path::new(CONTROLLER)).ok()?;
    let line = status.lines().find(|line| port_of(line) == Some(port))?;
    line.split_whitespace().nth(6).filter(|name| *name != "0-0").map(str::to_owned)
}

/// The `status` file, and `status.1` … of further controllers do not matter: eight ports of each speed are enough.
fn read_status(controller: &Path) -> Result<String> {
    let path: PathBuf = controller.join("status");
    fs::read_to_string(&path).with_context(|| format!("read {} (is vhci_hcd loaded?)", path.display()))
}

fn port_of(line: &str) -> Option<u32> {
    line.split_whitespace().nth(1)?.parse().ok()
}

fn free_ports(status: &str, speed: Speed) -> Vec<u32> {
    let hub = if speed == Speed::Super { "ss" } else { "hs" };
    let is_free = |line: &&str| {
        let mut fields = line.split_whitespace();
        fields.next() == Some(hub) && fields.nth(1) == Some(FREE)
    };
    status.lines().filter(is_free).filter_map(port_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "\
hub port sta spd dev      sockfd local_busid
hs  0000 006 003 00010000 000003 3-1
hs  0001 004 000 00000000 000000 0-0
hs  0002 004 000 00000000 000000 0-0
ss  0008 005 000 00000000 000000 0-0
ss  0009 004 000 00000000 000000 0-0
";

    #[test]
    fn only_free_ports_of_the_right_hub_are_taken() {
        assert_eq!(free_ports(STATUS, Speed::High), [1, 2]);
        assert_eq!(free_ports(STATUS, Speed::Super), [9]);
    }
}
